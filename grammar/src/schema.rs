//! JSON schemas, before llguidance sees them: what cannot be enforced is refused with its place, what would be too much work is
//! counted, and what says nothing about validity is taken out.

use std::collections::{HashMap, HashSet};

use llguidance::JsonCompileOptions;
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::limits::{
    MAX_BRANCHES, MAX_COMBINATORS, MAX_DEFINITIONS, MAX_ENUM_BYTES, MAX_ENUM_VALUES, MAX_MULTIPLE,
    MAX_OPTIONAL_PROPERTIES, MAX_PROPERTIES, MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, MAX_SCHEMA_PATH,
    MAX_SCHEMA_VALUES,
};
use crate::patterns;

/// Between a JSON text's parts: nothing, a space, or a line break with up to 20 spaces. Without a bound models fill their
/// answers up with blanks; without any they write empty arrays.
const WHITESPACE: &str = r"[ ]{0,1}|\n[ ]{0,20}";

/// Keywords that say something about validity and cannot be enforced.
const UNSUPPORTED: &[&str] = &[
    "not",
    "if",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "uniqueItems",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
];

/// Keywords that llguidance refuses and that say nothing about validity, at least without those above.
const SAY_NOTHING: &[&str] = &[
    "then",
    "else",
    "minContains",
    "maxContains",
    "deprecated",
    "contentSchema",
    "$vocabulary",
    "$dynamicAnchor",
    "$recursiveAnchor",
];

/// Formats that are enforced: llguidance's. Others are annotations, as the specification has it.
const FORMATS: &[&str] =
    &["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// The schema as llguidance takes it.
pub(crate) fn prepare(text: &str) -> Result<Value, Error> {
    if text.len() > MAX_SCHEMA_BYTES {
        let message = format!(
            "the schema has {} bytes, but at most {MAX_SCHEMA_BYTES} are taken: shorten it",
            text.len()
        );
        return Err(Error::grammar(message));
    }
    let invalid = |error: serde_json::Error| Error::grammar(format!("the schema is not JSON: {error}"));
    let mut schema: Value = serde_json::from_str(text).map_err(invalid)?;
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    let Some(fields) = schema.as_object() else {
        let message = match &schema {
            Value::Bool(_) => "the schema is `false`, which allows nothing",
            _ => "the schema must be a JSON object",
        };
        return Err(Error::grammar(message));
    };
    if fields.contains_key("x-guidance") {
        let message = "`x-guidance` at / is not supported: how schemas are enforced is the server's choice";
        return Err(Error::grammar(message));
    }
    check_text(&schema)?;
    let removed = Walk::over(&schema)?;
    for (place, keyword) in removed {
        if let Some(Value::Object(fields)) = schema.pointer_mut(&place) {
            fields.shift_remove(keyword);
        }
    }
    JsonCompileOptions { whitespace_pattern: Some(WHITESPACE.to_owned()), ..JsonCompileOptions::default() }
        .apply_to(&mut schema);
    Ok(schema)
}

/// Limits of the text, whatever it means.
fn check_text(schema: &Value) -> Result<(), Error> {
    fn count(value: &Value, depth: usize, values: &mut usize) -> usize {
        *values += 1;
        match value {
            Value::Array(items) => {
                items.iter().map(|item| count(item, depth + 1, values)).max().unwrap_or(depth + 1)
            }
            Value::Object(fields) => {
                fields.values().map(|field| count(field, depth + 1, values)).max().unwrap_or(depth + 1)
            }
            _ => depth,
        }
    }
    let mut values = 0;
    let depth = count(schema, 0, &mut values);
    at_most(values, MAX_SCHEMA_VALUES, "", "values")?;
    at_most(depth, MAX_SCHEMA_DEPTH, "", "levels of arrays and objects")
}

fn at_most(given: usize, limit: usize, place: &str, what: &str) -> Result<(), Error> {
    if given <= limit {
        return Ok(());
    }
    let place = if place.is_empty() { String::new() } else { format!(" at {place}") };
    Err(Error::grammar(format!(
        "the schema{place} has {given} {what}, but at most {limit} are taken: simplify it"
    )))
}

/// Goes through a schema as llguidance compiles it: from the root, and into what is referred to when it is met first.
struct Walk<'a> {
    root: Part<'a>,
    anchors: HashMap<&'a str, Part<'a>>,
    /// Places that were referred to.
    seen: HashSet<String>,
    /// Of places that were added up.
    merged: HashMap<String, Option<Merged>>,
    properties: usize,
    enum_values: usize,
    enum_bytes: usize,
    /// Keywords to take out, by place.
    removed: Vec<(String, &'static str)>,
}

/// A schema within the schema, and its place as a JSON pointer.
#[derive(Clone)]
struct Part<'a> {
    schema: &'a Value,
    place: String,
}

/// What holds at the same time at one place.
#[derive(Clone, Copy)]
struct Merged {
    branches: u64,
    multiple: u64,
    optional: usize,
}

/// How deep one is.
#[derive(Clone, Copy)]
struct Depth {
    path: usize,
    combinators: usize,
}

impl<'a> Walk<'a> {
    /// Returns what is to be taken out.
    fn over(schema: &'a Value) -> Result<Vec<(String, &'static str)>, Error> {
        let root = Part { schema, place: String::new() };
        let mut walk = Self {
            root: root.clone(),
            anchors: HashMap::new(),
            seen: HashSet::new(),
            merged: HashMap::new(),
            properties: 0,
            enum_values: 0,
            enum_bytes: 0,
            removed: Vec::new(),
        };
        walk.find_anchors(&root);
        walk.enter(&root, &root, Depth { path: 0, combinators: 0 })?;
        Ok(walk.removed)
    }

    /// Anywhere: what is no schema has no anchors that anybody refers to.
    fn find_anchors(&mut self, part: &Part<'a>) {
        match part.schema {
            Value::Object(fields) => {
                let old = fields.get("$id").and_then(Value::as_str).and_then(|id| id.strip_prefix('#'));
                for name in fields.get("$anchor").and_then(Value::as_str).into_iter().chain(old) {
                    self.anchors.insert(name, part.clone());
                }
                for (key, schema) in fields {
                    self.find_anchors(&part.child(key, schema));
                }
            }
            Value::Array(items) => {
                for (index, schema) in items.iter().enumerate() {
                    self.find_anchors(&part.child(&index.to_string(), schema));
                }
            }
            _ => {}
        }
    }

    fn enter(&mut self, part: &Part<'a>, resource: &Part<'a>, depth: Depth) -> Result<(), Error> {
        let Value::Object(fields) = part.schema else { return Ok(()) };
        let place = &part.place;
        if depth.path > MAX_SCHEMA_PATH {
            let message = format!(
                "more than {MAX_SCHEMA_PATH} schemas are within each other, by nesting or `$ref`, up to {}: flatten it",
                shown(place)
            );
            return Err(Error::grammar(message));
        }
        let resource = if is_resource(fields) { part } else { resource };
        self.check_keywords(fields, part)?;
        self.check_values(fields, place)?;
        self.merge(part, resource)?;

        let inside = Depth { path: depth.path + 1, combinators: 0 };
        let combined = Depth { path: depth.path + 1, combinators: depth.combinators + 1 };
        for (keyword, value) in fields {
            let child = part.child(keyword, value);
            match (keyword.as_str(), value) {
                ("properties" | "patternProperties", Value::Object(map)) => {
                    for (name, schema) in map {
                        self.enter(&child.child(name, schema), resource, inside)?;
                    }
                }
                ("items" | "prefixItems", Value::Array(list)) => {
                    for (index, schema) in list.iter().enumerate() {
                        self.enter(&child.child(&index.to_string(), schema), resource, inside)?;
                    }
                }
                ("items" | "additionalItems" | "additionalProperties", _) => {
                    self.enter(&child, resource, inside)?;
                }
                ("allOf" | "anyOf" | "oneOf", Value::Array(list)) => {
                    at_most(
                        combined.combinators,
                        MAX_COMBINATORS,
                        place,
                        "`allOf`, `anyOf` and `oneOf` within each other",
                    )?;
                    for (index, schema) in list.iter().enumerate() {
                        self.enter(&child.child(&index.to_string(), schema), resource, combined)?;
                    }
                }
                ("$ref", Value::String(reference)) => {
                    if let Some(target) = self.resolve(reference, resource, place)?
                        && self.seen.insert(target.place.clone())
                    {
                        let depth = Depth { path: depth.path + 1, ..depth };
                        self.enter(&target, resource, depth)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check_keywords(&mut self, fields: &Map<String, Value>, part: &Part<'a>) -> Result<(), Error> {
        let place = &part.place;
        for keyword in UNSUPPORTED {
            let Some(value) = fields.get(*keyword) else { continue };
            let says_nothing = match *keyword {
                "uniqueItems" => *value == json!(false),
                "unevaluatedItems" | "unevaluatedProperties" => *value == json!(true),
                "if" => !fields.contains_key("then") && !fields.contains_key("else"),
                _ => false,
            };
            if !says_nothing {
                return Err(Error::grammar(format!(
                    "`{keyword}` at {} cannot be enforced: leave it out, or say the same with the keywords that \
                     docs/grammar.md lists",
                    shown(place)
                )));
            }
            self.removed.push((place.clone(), keyword));
        }
        for keyword in SAY_NOTHING {
            if fields.contains_key(*keyword) {
                self.removed.push((place.clone(), keyword));
            }
        }
        let format = fields.get("format").and_then(Value::as_str);
        if format.is_some_and(|name| !FORMATS.contains(&name)) {
            self.removed.push((place.clone(), "format"));
        }
        Ok(())
    }

    fn check_values(&mut self, fields: &Map<String, Value>, place: &str) -> Result<(), Error> {
        let object = |keyword| fields.get(keyword).and_then(Value::as_object);
        for keyword in ["$defs", "definitions"] {
            at_most(object(keyword).map_or(0, Map::len), MAX_DEFINITIONS, place, "definitions")?;
        }
        let properties = object("properties");
        let undescribed = required(fields)
            .filter(|name| properties.is_none_or(|properties| !properties.contains_key(*name)))
            .count();
        self.properties += properties.map_or(0, Map::len) + undescribed;
        at_most(self.properties, MAX_PROPERTIES, "", "properties in all")?;
        if let Some(values) = fields.get("enum").and_then(Value::as_array) {
            self.enum_values += values.len();
            self.enum_bytes += values.iter().map(|value| value.to_string().len()).sum::<usize>();
            at_most(self.enum_values, MAX_ENUM_VALUES, "", "`enum` values in all")?;
            at_most(self.enum_bytes, MAX_ENUM_BYTES, "", "bytes of `enum` values in all")?;
        }
        if let Some(pattern) = fields.get("pattern").and_then(Value::as_str) {
            patterns::check(pattern, &format!("`pattern` at {}", shown(place)))?;
        }
        for pattern in object("patternProperties").into_iter().flat_map(Map::keys) {
            patterns::check(pattern, &format!("a key of `patternProperties` at {}", shown(place)))?;
        }
        Ok(())
    }

    /// Adds up what holds at the same time at one place.
    fn merge(&mut self, part: &Part<'a>, resource: &Part<'a>) -> Result<Merged, Error> {
        let nothing = Merged { branches: 1, multiple: 1, optional: 0 };
        let Value::Object(fields) = part.schema else { return Ok(nothing) };
        // A schema that refers to itself in place says nothing by that.
        match self.merged.get(&part.place) {
            Some(known) => return Ok(known.unwrap_or(nothing)),
            None => self.merged.insert(part.place.clone(), None),
        };
        let resource = if is_resource(fields) { part } else { resource };
        let mut parts = Vec::new();
        for keyword in ["allOf", "anyOf", "oneOf"] {
            let Some(Value::Array(list)) = fields.get(keyword) else { continue };
            let child = part.child(keyword, &fields[keyword]);
            let mut of_list = Vec::with_capacity(list.len());
            for (index, schema) in list.iter().enumerate() {
                of_list.push(self.merge(&child.child(&index.to_string(), schema), resource)?);
            }
            if keyword == "allOf" {
                parts.append(&mut of_list);
            } else {
                parts.push(Merged {
                    branches: of_list.iter().map(|one| one.branches).fold(0, u64::saturating_add).max(1),
                    multiple: of_list.iter().map(|one| one.multiple).max().unwrap_or(1),
                    optional: of_list.iter().map(|one| one.optional).max().unwrap_or(0),
                });
            }
        }
        if let Some(Value::String(reference)) = fields.get("$ref")
            && let Some(target) = self.resolve(reference, resource, &part.place)?
        {
            parts.push(self.merge(&target, resource)?);
        }
        let merged = Merged {
            branches: parts.iter().map(|part| part.branches).fold(1, u64::saturating_mul),
            multiple: parts.iter().map(|part| part.multiple).fold(own_multiple(fields), u64::saturating_mul),
            optional: own_optional(fields) + parts.iter().map(|part| part.optional).sum::<usize>(),
        };
        let place = &part.place;
        if parts.iter().filter(|part| part.branches > 1).count() > 1 && merged.branches > MAX_BRANCHES {
            let what = "combinations of branches of `anyOf` and `oneOf` that hold at the same time";
            at_most(merged.branches as usize, MAX_BRANCHES as usize, place, what)?;
        }
        if merged.multiple > MAX_MULTIPLE {
            let message = format!(
                "`multipleOf` at {} is {} without its decimal point (all that hold at this place, multiplied), but at \
                 most {MAX_MULTIPLE} can be enforced: leave it out",
                shown(place),
                merged.multiple
            );
            return Err(Error::grammar(message));
        }
        at_most(
            merged.optional,
            MAX_OPTIONAL_PROPERTIES,
            place,
            "properties that are not in `required` in one object",
        )?;
        self.merged.insert(part.place.clone(), Some(merged));
        Ok(merged)
    }

    /// What a `$ref` names; none where there is no such place, which llguidance says.
    fn resolve(&self, reference: &str, resource: &Part<'a>, place: &str) -> Result<Option<Part<'a>>, Error> {
        let root_id = self.root.schema.get("$id").and_then(Value::as_str).map(|id| id.trim_end_matches('#'));
        let (base, fragment) = match reference.split_once('#') {
            Some(("", fragment)) => (resource, fragment),
            Some((uri, fragment)) if Some(uri) == root_id => (&self.root, fragment),
            None if Some(reference) == root_id => (&self.root, ""),
            _ => {
                let name: String = reference.chars().take(100).collect();
                return Err(Error::grammar(format!(
                    "`$ref` at {} names {name:?}, which is not in the schema: nothing is fetched, so put it into `$defs` \
                     and refer to it by \"#/$defs/...\"",
                    shown(place)
                )));
            }
        };
        if fragment.is_empty() {
            return Ok(Some(base.clone()));
        }
        if !fragment.starts_with('/') {
            return Ok(self.anchors.get(fragment).cloned());
        }
        let pointer = percent_decoded(fragment);
        Ok(base
            .schema
            .pointer(&pointer)
            .map(|schema| Part { schema, place: format!("{}{pointer}", base.place) }))
    }
}

impl<'a> Part<'a> {
    fn child(&self, key: &str, schema: &'a Value) -> Self {
        let key = key.replace('~', "~0").replace('/', "~1");
        Self { schema, place: format!("{}/{key}", self.place) }
    }
}

/// A pointer as messages have it, not too long.
fn shown(place: &str) -> String {
    match place.char_indices().nth(200) {
        _ if place.is_empty() => "/".to_owned(),
        Some((end, _)) => format!("{}...", &place[..end]),
        None => place.to_owned(),
    }
}

/// Whether references within it are relative to it.
fn is_resource(fields: &Map<String, Value>) -> bool {
    fields.get("$id").and_then(Value::as_str).is_some_and(|id| !id.starts_with('#'))
}

fn required(fields: &Map<String, Value>) -> impl Iterator<Item = &str> {
    fields.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

fn own_optional(fields: &Map<String, Value>) -> usize {
    let Some(properties) = fields.get("properties").and_then(Value::as_object) else { return 0 };
    let required: HashSet<&str> = required(fields).collect();
    properties.keys().filter(|name| !required.contains(name.as_str())).count()
}

/// `multipleOf` as a whole number: its digits, or the scale where that is larger.
fn own_multiple(fields: &Map<String, Value>) -> u64 {
    let Some(Value::Number(number)) = fields.get("multipleOf") else { return 1 };
    let text = number.to_string();
    if text.contains(['e', 'E']) {
        // Very large or very small.
        return u64::MAX;
    }
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let fraction = fraction.trim_end_matches('0');
    let digits = format!("{}{fraction}", whole.trim_start_matches('-'));
    let digits = digits.trim_start_matches('0').parse::<u64>().unwrap_or(u64::MAX).max(1);
    let scale = 10u64.checked_pow(fraction.len() as u32).unwrap_or(u64::MAX);
    digits.saturating_mul(scale)
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) if first == b'%' => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
