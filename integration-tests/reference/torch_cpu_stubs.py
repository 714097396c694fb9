#!/usr/bin/env python3
"""Makes torch from PyPI importable on a machine without the CUDA libraries that it links to.

PyPI's torch wheel needs about 2.5 GB of nvidia-* wheels only to be imported. This script builds, in a second, tiny
shared objects with the missing names and symbol versions. CPU operations never call into them; whatever asks for a
device is told that the driver is missing (35, cudaErrorInsufficientDriver).

Usage: torch_cpu_stubs.py SITE_PACKAGES [OUT]     OUT defaults to SITE_PACKAGES/torch/lib, where torch finds them itself.
"""
import collections
import os
import re
import subprocess
import sys
import tempfile

# Libraries that every Linux with a C++ compiler has.
SYSTEM = re.compile(
    r"^(libc\.so|libm\.so|libdl|librt|libpthread|libstdc|libgcc_s|ld-linux|libgomp|libgfortran|libquadmath|libnuma|libz)"
)
SYSTEM_VERSION = re.compile(r"^(GLIBC|GLIBCXX|CXXABI|GCC_|GOMP|OMP|GFORTRAN|ZLIB|QUADMATH|libnuma)")
CUDA_SYMBOL = re.compile(r"^(cu[A-Za-z]|__cuda|nccl|nvshmem|nvrtc|nvJit|nvml|cufile|cupti|_ZN.*nvshmem)")
# Symbols without a version do not say whose they are; cudart is the owner unless a name says otherwise.
OWNERS = {
    "nccl": "libnccl", "nvshmem": "libnvshmem", "cusolver": "libcusolver", "cusparseLt": "libcusparseLt",
    "cuFile": "libcufile", "cupti": "libcupti", "nvrtc": "libnvrtc",
}
# These run while torch is imported, so they must answer sensibly; a plain error code crashes it.
BODIES = {
    "cudaStreamIsCapturing": "int cudaStreamIsCapturing(void *s, int *o) { *o = 0; return 0; }",
    "cudaGetDevice": "int cudaGetDevice(int *o) { *o = 0; return 0; }",
    "cudaGetLastError": "int cudaGetLastError(void) { return 0; }",
    "cudaPeekAtLastError": "int cudaPeekAtLastError(void) { return 0; }",
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *o) { *o = 0; return 100; }",
    "cuDevicePrimaryCtxGetState":
        "int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { if (f) *f = 0; if (a) *a = 0; return 0; }",
}
RETURNS_TEXT = re.compile(r"(GetErrorString|GetErrorName|StatusString|StatusName|GetStatusString|_get_error)$|ErrorString")


def lines(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def scan(libraries):
    """The undefined symbols (as name@version), the defined names and the needed sonames of all `libraries`."""
    undefined, defined, needed = set(), set(), set()
    for library in libraries:
        for line in lines("nm", "-D", "--with-symbol-versions", library):
            parts = line.split()
            if len(parts) >= 2 and parts[-2] in "Uwv":
                undefined.add(parts[-1])
            elif len(parts) == 3:
                defined.add(parts[2].split("@")[0])
        for line in lines("readelf", "-d", library):
            needed.update(re.findall(r"NEEDED.*\[(.*?)\]", line))
    return undefined, defined, needed


def body(name):
    if RETURNS_TEXT.search(name):
        return f'const char *{name}(void) {{ return "no CUDA (stub)"; }}'
    return BODIES.get(name, f"long {name}(void) {{ return 35; }}")


def build(soname, symbols, versions, out):
    with tempfile.TemporaryDirectory() as scratch:
        source = os.path.join(scratch, "stub.c")
        with open(source, "w") as file:
            file.write("\n".join(body(name) for name in sorted(symbols)))
            file.write(f"\nint stub_{re.sub('[^a-z0-9]', '_', soname.lower())};\n")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-fno-builtin", f"-Wl,-soname,{soname}",
                   "-o", os.path.join(out, soname), source]
        if versions:
            script = os.path.join(scratch, "stub.map")
            with open(script, "w") as file:
                for version, names in versions.items():
                    file.write(f"{version} {{ global: {' '.join(f'{n};' for n in sorted(names))} }};\n")
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)


def main():
    torch_lib = os.path.join(sys.argv[1], "torch/lib")
    out = sys.argv[2] if len(sys.argv) > 2 else torch_lib
    os.makedirs(out, exist_ok=True)
    libraries = [os.path.join(torch_lib, f) for f in os.listdir(torch_lib) if ".so" in f]
    undefined, defined, needed = scan(libraries)
    present = {os.path.basename(library) for library in libraries}
    missing = sorted(n for n in needed if n not in present and not SYSTEM.match(n))
    versioned, plain = collections.defaultdict(lambda: collections.defaultdict(set)), set()
    for symbol in undefined:
        name, _, version = symbol.partition("@")
        version = version.lstrip("@")
        if name in defined:
            continue
        if version.startswith("NVSHMEM"):
            versioned["libnvshmem_host.so.3"][version].add(name)
        elif version in missing:
            versioned[version][version].add(name)
        elif not version and CUDA_SYMBOL.match(name):
            plain.add(name)
        elif version and not SYSTEM_VERSION.match(version):
            print("left alone: unknown version", symbol, file=sys.stderr)
    for soname in missing:
        symbols = set().union(*versioned[soname].values()) if versioned[soname] else set()
        for name in plain:
            owner = next((library for part, library in OWNERS.items() if part in name), "libcudart")
            if soname.startswith(owner):
                symbols.add(name)
        build(soname, symbols, versioned[soname], out)
    print(f"{len(missing)} stub libraries in {out}")


if __name__ == "__main__":
    main()
