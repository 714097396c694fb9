#!/bin/sh
# Makes the Python environment that regenerates the artefacts in this repository (goldens, the demo model).
# The build, the tests and the server never need it. Takes about two minutes and 1.7 GB under target/.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=$root/target/reference-venv

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
# torch comes alone and the rest after it: its dependencies are gigabytes of CUDA libraries that CPU use never calls.
grep '^torch==' "$here/requirements.txt" | xargs "$venv/bin/pip" install --quiet --no-deps
grep -v '^torch==' "$here/requirements.txt" | "$venv/bin/pip" install --quiet -r /dev/stdin
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
"$venv/bin/python" "$here/torch_cpu_stubs.py" "$site"
"$venv/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'

cat <<EOF
ready. From $root:
  target/reference-venv/bin/python integration-tests/goldens/make_goldens.py          regenerates the goldens
  target/reference-venv/bin/python integration-tests/demo-model/evaluate.py           scores the demo model
  see integration-tests/demo-model/README.md for training it again
EOF
