"""Write what the bindings of enterprise TensorRT offer: ``signatures.json`` beside this file, which tests hold the backend to.

TensorRT's libraries are not on PyPI, its Python bindings are (``tensorrt-cu12-bindings``; NVIDIA's licence, of which nothing is copied but names).
They import without the libraries where something answers to the libraries' names: an empty ``libnvinfer`` of nine functions that return nothing. No
function of TensorRT is called; what is written down is each name that pybind11 registers, and the signature that it prints of it.

    python tests/enterprise/read_bindings.py        # downloads five wheels into a temporary folder; needs pip, a C compiler and Python 3.11
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

VERSIONS = ("10.15.1.29", "10.16.1.11", "11.0.0.114", "11.1.0.106", "11.4.0.106")
OUT = Path(__file__).with_name("signatures.json")
CLASSES = (
    "BuilderFlag CausalMaskKind DataType HardwareCompatibilityLevel LayerInformationFormat LayerType MemoryPoolType "
    "NetworkDefinitionCreationFlag ProfilingVerbosity TensorIOMode Builder EngineInspector IAttention IAttentionInputLayer "
    "IBuilderConfig ICastLayer ICudaEngine IExecutionContext IHostMemory ILayer ILogger INetworkDefinition IOptimizationProfile "
    "IProgressMonitor IRuntimeConfig IStreamWriter ITensor ITimingCache OnnxParser OnnxParserRefitter ParserError Refitter Runtime"
).split()
SYMBOLS = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParserRefitter_INTERNAL "
    "createNvOnnxParser_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins"
).split()
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
DUMP = """
import json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
found = {}
for name in sys.argv[2].split():
    kind = getattr(trt, name, None)
    for attribute in dir(kind) if kind else ():
        value = getattr(kind, attribute)
        if attribute == "__init__" or not attribute.startswith("_"):
            is_function = type(value).__name__ in ("instancemethod", "builtin_function_or_method")
            found[f"{name}.{attribute}"] = value.__doc__ if is_function else None
print(json.dumps(found))
"""


def main() -> None:
    """Download, read, write."""
    names: dict[str, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        libraries = empty_libraries(Path(scratch) / "libraries")
        for version in VERSIONS:
            folder = download(version, Path(scratch) / version)
            for name in sorted(read(folder, libraries)):
                names[name].append(version)
    everywhere = {name: "all" if tuple(found) == VERSIONS else found for name, found in sorted(names.items())}
    origin = "pip download tensorrt-cu12-bindings; remade by tests/enterprise/read_bindings.py"
    lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in everywhere.items())
    OUT.write_text(f'{{"origin": {json.dumps(origin)},\n "versions": {json.dumps(VERSIONS)},\n "names": {{\n  {lines}\n }}}}\n', encoding="utf-8")


def empty_libraries(folder: Path) -> Path:
    """Libraries of the names that the bindings ask for, without anything in them."""
    folder.mkdir()
    source = folder / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for major in sorted({version.split(".")[0] for version in VERSIONS}):
        for name in LIBRARIES:
            library = f"lib{name}.so.{major}"
            subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(folder / library), f"-Wl,-soname,{library}"], check=True)
    return folder


def download(version: str, folder: Path) -> Path:
    """The bindings of a release, unpacked."""
    package = f"tensorrt-cu12-bindings=={version}"
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(folder), package], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def read(folder: Path, libraries: Path) -> set[str]:
    """``IBuilderConfig.set_flag(flag)``, ``IBuilderConfig.flags``, … of one release; a function with overloads has a line for each."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, "-c", DUMP, str(folder), " ".join(CLASSES)]
    found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    return {line for name, document in found.items() for line in signatures(name, document)}


def signatures(name: str, document: str | None) -> list[str]:
    """The parameters that pybind11 prints, by name, ``=`` behind those that have a default."""
    if document is None:
        return [name]
    method = re.escape(name.rsplit(".", 1)[1])
    printed = re.findall(rf"^(?:\d+\. )?{method}\((self: .*)\) -> ", document, re.MULTILINE)
    return [f"{name}({', '.join(parameters(one))})" for one in printed] or [name]


def parameters(printed: str) -> list[str]:
    """``self: A, flag: B, size: int = 0`` → flag, size=."""
    depth, words = 0, [""]
    for letter in printed:
        depth += (letter in "[(<{") - (letter in "])>}")
        words = [*words, ""] if letter == "," and not depth else [*words[:-1], words[-1] + letter]
    return [word.split(":")[0].strip() + ("=" if " = " in word else "") for word in words[1:]]


if __name__ == "__main__":
    main()
