"""Takes a sample of the JSON-Schema-Test-Suite, one group of tests in each line: make_sample.py SUITE > json-schema-test-suite.jsonl

SUITE: the folder `tests/draft2020-12` of the suite (of https://github.com/json-schema-org/JSON-Schema-Test-Suite, or in the folder `json/` of the
source package of `jsonschema` on PyPI). With `--all`, every file is taken: for the example `test_suite`.
"""

import json
import pathlib
import sys

# Keywords that are enforced.
SAMPLE = """additionalProperties allOf anchor anyOf boolean_schema const defs enum exclusiveMaximum exclusiveMinimum items maxItems
maxLength maximum minItems minLength minimum multipleOf oneOf pattern patternProperties prefixItems properties ref required type""".split()


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--all"]
    for path in sorted(pathlib.Path(arguments[0]).rglob("*.json")):
        if "--all" not in sys.argv and (path.stem not in SAMPLE or "optional" in path.parts):
            continue
        for group in json.loads(path.read_text()):
            tests = [
                {"valid": test["valid"], "text": json.dumps(test["data"], ensure_ascii=False)} for test in group["tests"]
            ]
            line = {
                "id": f"{path.stem} / {group['description']}",
                "schema": json.dumps(group["schema"], ensure_ascii=False),
                "tests": tests,
            }
            print(json.dumps(line, ensure_ascii=False))


main()
