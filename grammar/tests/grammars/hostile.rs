//! Grammars that would take a server down are refused, or done with soon: on a thread as servers have it.

use std::time::{Duration, Instant};

use grammar::Source;
use serde_json::{Map, Value, json};

use crate::models::MODELS;

/// Far above what any of these takes, and far below what the worst of them took without limits.
const SOON: Duration = Duration::from_secs(10);

fn refused(schema: &Value, parts: &[&str]) {
    refused_source(Source::json_schema(schema), parts);
}

fn refused_source(source: Source, parts: &[&str]) {
    let began = Instant::now();
    let error = MODELS[0].compile(source).err().expect("it is refused").to_string();
    assert!(began.elapsed() < SOON, "it took {:?}", began.elapsed());
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
}

fn bounded(source: Source) {
    let began = Instant::now();
    let outcome = MODELS[0].compile(source);
    assert!(began.elapsed() < SOON, "it took {:?}", began.elapsed());
    // Whichever: a mask is computed by whoever compiles, so what comes through has a first one.
    drop(outcome);
}

fn object(properties: impl Iterator<Item = (String, Value)>) -> Value {
    json!({"type": "object", "properties": properties.collect::<Map<_, _>>()})
}

/// Objects, each of which refers to the next.
fn chain(len: usize) -> Value {
    let link = |index: usize| {
        let next = json!({"$ref": format!("#/$defs/n{}", (index + 1).min(len))});
        (format!("n{index}"), json!({"type": "object", "properties": {"next": next}}))
    };
    json!({"$ref": "#/$defs/n0", "$defs": (0..=len).map(link).collect::<Map<_, _>>()})
}

/// Objects within each other.
fn nested(depth: usize) -> Value {
    (0..depth).fold(json!({"type": "integer"}), |inner, _| json!({"properties": {"a": inner}}))
}

#[test]
fn chains_of_references_end_no_process() {
    for len in [500, 2000, 4000] {
        refused(&chain(len), &["256", "within each other"]);
    }
    MODELS[0].schema(&chain(100));
    refused(
        &json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        &[],
    );
    let aliases = |index: usize| (format!("n{index}"), json!({"$ref": format!("#/$defs/n{}", index + 1)}));
    refused(&json!({"$ref": "#/$defs/n0", "$defs": (0..2000).map(aliases).collect::<Map<_, _>>()}), &["256"]);
}

#[test]
fn nesting_is_bounded() {
    refused(&nested(40), &["64", "levels"]);
    // The text is not even parsed.
    refused(&nested(200), &["not JSON", "recursion"]);
    MODELS[0].schema(&nested(25));
}

#[test]
fn large_multiples_are_refused() {
    for multiple in [json!(9973), json!(999_983), json!(0.000_01), json!(1e30)] {
        refused(&json!({"type": "number", "multipleOf": multiple}), &["multipleOf", "1000"]);
    }
    refused(&json!({"allOf": [{"multipleOf": 97}, {"multipleOf": 89}]}), &["8633"]);
    MODELS[0].schema(&json!({"type": "integer", "multipleOf": 997}));
    MODELS[0].schema(&json!({"type": "number", "multipleOf": 0.01}));
}

#[test]
fn many_optional_properties_are_refused_and_required_ones_are_not() {
    let properties =
        |len: usize| object((0..len).map(|index| (format!("p{index}"), json!({"type": "integer"}))));
    refused(&properties(5001), &["5001", "5000"]);
    refused(&properties(401), &["401", "400", "required"]);
    MODELS[0].schema(&properties(400));
    let mut required = properties(2000);
    required["required"] = (0..2000).map(|index| format!("p{index}")).collect();
    MODELS[0].schema(&required);
    let part = |part: usize| object((0..300).map(move |index| (format!("p{part}x{index}"), json!(true))));
    refused(&json!({"allOf": [part(0), part(1)]}), &["600", "400"]);
}

#[test]
fn products_of_branches_are_refused() {
    let branches = |name: usize| {
        let branch = move |index: usize| json!({"properties": {format!("p{name}"): {"const": index}}});
        json!({"anyOf": (0..4).map(branch).collect::<Vec<_>>()})
    };
    refused(&json!({"allOf": (0..6).map(branches).collect::<Vec<_>>()}), &["4096", "256"]);
    let defined: Map<_, _> = (0..6).map(|name| (format!("d{name}"), branches(name))).collect();
    let references: Vec<_> = (0..6).map(|name| json!({"$ref": format!("#/$defs/d{name}")})).collect();
    refused(&json!({"allOf": references, "$defs": defined}), &["4096", "256"]);
    let doubling =
        |depth: usize| (0..depth).fold(json!({"type": "null"}), |inner, _| json!({"anyOf": [inner, inner]}));
    refused(&doubling(11), &["11", "10"]);
    bounded(Source::json_schema(&doubling(10)));
}

#[test]
fn large_enums_and_texts_are_refused() {
    let values = |len: usize| json!({"enum": (0..len).map(|index| format!("v{index}")).collect::<Vec<_>>()});
    refused(&values(10_001), &["10001", "10000"]);
    bounded(Source::json_schema(&values(10_000)));
    refused(&json!({"enum": ["x".repeat(600 << 10)]}), &["524288"]);
    refused(&json!({"description": "x".repeat(1 << 20)}), &["1048576"]);
    refused(&json!({"default": vec![0; 30_001]}), &["30000"]);
}

#[test]
fn regexes_are_bounded() {
    let regex = |regex: &str| bounded(Source::regex(regex));
    for hostile in [
        ".*a.{200}b.{200}",
        "(.*a.{20})*",
        r"\w{1,5000}\d{1,5000}",
        "((a{1,100}){1,100}){1,100}",
        "(a|b|ab)*c(a*)*$",
    ] {
        regex(hostile);
        bounded(Source::json_schema(&json!({"type": "string", "pattern": hostile})));
    }
    refused_source(Source::regex(&"(".repeat(60_000)), &["16384"]);
    refused_source(Source::regex("a(?!b)"), &["look-around", "at byte 1"]);
    refused(&json!({"properties": {"a/b": {"pattern": "(?<=x)y"}}}), &["/properties/a~1b"]);
    for bounds in
        [json!({"maxLength": 100_000}), json!({"minLength": 1_000_000}), json!({"minItems": 1_000_000_000})]
    {
        bounded(Source::json_schema(&bounds));
    }
}

#[test]
fn what_cannot_be_enforced_is_named_with_its_place() {
    let cases = [
        (json!({"properties": {"a": {"not": {"type": "null"}}}}), "`not` at /properties/a"),
        (json!({"items": {"uniqueItems": true}}), "`uniqueItems` at /items"),
        (json!({"anyOf": [{"if": {}, "then": {}}]}), "`if` at /anyOf/0"),
        (json!({"$ref": "#/$defs/x", "$defs": {"x": {"contains": {}}}}), "`contains` at /$defs/x"),
        (json!({"dependencies": {"a": ["b"]}}), "`dependencies` at /"),
        (json!({"items": {"$ref": "https://example.com/schema"}}), "`$ref` at /items"),
        (json!({"x-guidance": {"lenient": true}}), "`x-guidance`"),
        (json!({"properties": []}), "properties must be an object"),
        (json!({"type": "strin"}), "strin"),
        (json!(false), "nothing"),
        (json!([]), "must be a JSON object"),
    ];
    for (schema, part) in cases {
        refused(&schema, &[part]);
    }
}

#[test]
fn what_says_nothing_is_no_reason_to_refuse() {
    let schemas = [
        json!({"type": "string", "format": "phone-number"}),
        json!({"type": "array", "uniqueItems": false, "items": {"deprecated": true, "type": "null"}}),
        json!({"if": {"type": "null"}, "type": "integer"}),
        json!({"then": {"not": {}}, "type": "integer"}),
        json!({"$defs": {"unused": {"not": {}}}, "type": "integer"}),
        json!({"unevaluatedProperties": true, "type": "object"}),
        json!({"properties": {"not": {"type": "string"}, "if": {"type": "null"}}}),
        json!(true),
    ];
    for schema in schemas {
        MODELS[0].schema(&schema);
    }
}
