"""Compares LiteRT's kernels on ARM with the simulator's x86 profiles: single ops in qemu-user.

`make FOLDER` draws the kernel tests' cases (tests/kernel_cases.py) and writes each as a .tflite
with its inputs and what the profiles litert_ref, litert_opt and litert_xnn make of them. `check
FOLDER` needs only NumPy and ai-edge-litert, and so runs in any Python; on ARM, or on Debian by
emulation:

    dpkg --add-architecture arm64 && apt-get update && apt-get install qemu-user-static
    for p in python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libstdc++6 \\
        libgcc-s1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libssl3 libuuid1 libcrypt1
    do apt-get download $p:arm64; done
    for d in *.deb; do dpkg-deb -x $d root; done
    pip download --no-deps --only-binary=:all: --python-version 3.11 \\
        --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 \\
        ai-edge-litert==2.3.0 numpy==2.4.6
    for w in *.whl; do unzip -q $w -d site; done
    pip install --target site --no-deps flatbuffers protobuf typing_extensions tqdm \\
        backports.strenum
    QEMU_LD_PREFIX=$PWD/root PYTHONHOME=$PWD/root/usr PYTHONPATH=$PWD/site \\
        qemu-aarch64-static root/usr/bin/python3.11 benchmarks/aarch64.py check FOLDER

The last line is the headline. `check` exits with 1 where the reference kernels differ, or crash:
those are plain C++, the same on every machine; what the others differ in is the finding. Both exit
with 2 where they could not run.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

KERNELS = {"litert_ref": "BUILTIN_REF", "litert_opt": "BUILTIN_WITHOUT_DEFAULT_DELEGATES"}
KERNELS |= {"litert_xnn": "BUILTIN"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["make", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=8, help="of every variant")
    parser.add_argument("--quick", action="store_true", help="one case of every variant")
    return parser.parse_args()


def make(folder: Path, cases: int) -> None:
    """Writes every case into `folder`: model, inputs, and the output of each profile."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import jax
    from kernel_cases import VARIANTS  # pyright: ignore[reportMissingImports]
    from single_op import single_op  # pyright: ignore[reportMissingImports]

    from qnpu_jax.errors import UserError

    folder.mkdir(parents=True, exist_ok=True)
    for v, variant in enumerate(VARIANTS):
        rng = np.random.default_rng(v)
        kernel: Any = jax.jit(variant.kernel)
        for i in range(cases):
            case = variant.case(rng)
            arrays = {f"x{n}": t.data for n, t in enumerate(case.inputs) if not t.constant}
            with jax.enable_x64():
                for profile in KERNELS:
                    try:
                        constants = case.constants(profile)  # pyright: ignore[reportArgumentType]
                    except UserError:  # XNNPACK refuses it
                        continue
                    arrays[profile] = np.asarray(kernel(*case.arrays, *constants))
            name = f"{variant.op.__name__} {case.inputs[0].dtype}-{v}-{i}"
            model = single_op(variant.code, variant.options, case.inputs, case.output)
            (folder / f"{name}.tflite").write_bytes(model.to_bytes())
            np.savez(folder / f"{name}.npz", **arrays)


def differences(path: Path, profile: str) -> tuple[int, int, int]:
    """Counts elements that differ, all elements, and the largest difference, of one model and
    kernel set."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    arrays = dict(np.load(path.with_suffix(".npz")))
    feeds = {n: x for n, x in arrays.items() if n not in KERNELS}
    resolver = getattr(OpResolverType, KERNELS[profile])
    interpreter = Interpreter(model_path=str(path), experimental_op_resolver_type=resolver)
    y = interpreter.get_signature_runner("op")(**feeds)["y"].astype(np.int64)
    distance = np.abs(y - arrays[profile])
    return int(np.count_nonzero(distance)), distance.size, int(distance.max())


def in_a_child(path: Path, profile: str) -> tuple[int, int, int] | None:
    """`differences`, in a process of its own; None where that dies, as emulation may."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, repr(differences(path, profile)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        return None
    return tuple(int(n) for n in answer.strip("()").split(","))  # pyright: ignore


def check(folder: Path) -> int:
    """Prints differing elements by op and kernel set."""
    count: dict[tuple[str, str], Any] = defaultdict(lambda: np.zeros(4, np.int64))
    for path in sorted(folder.glob("*.tflite")):
        with np.load(path.with_suffix(".npz")) as arrays:
            profiles = [p for p in KERNELS if p in arrays]
        for profile in profiles:
            row = count[path.stem.split("-")[0], profile]
            found = in_a_child(path, profile)
            if found is None:
                row[3] += 1
            else:
                row[:2] += found[:2]
                row[2] = max(row[2], found[2])
    print(f"{'op':24}{'kernels':12}{'differ':>9}{'elements':>10}{'by at most':>12}{'crashed':>9}")
    for (op, profile), (differ, size, most, crashed) in sorted(count.items()):
        print(f"{op:24}{profile:12}{differ:9}{size:10}{most:12}{crashed:9}")
    totals = {
        p: [sum(int(r[k]) for (_, q), r in count.items() if q == p) for k in (0, 1, 3)]
        for p in KERNELS
    }
    shown = ", ".join(f"{p} {n} of {m} ({c} crashed)" for p, (n, m, c) in totals.items())
    print(f"elements that differ on {platform.machine()}: {shown}")
    differ, size, crashed = totals["litert_ref"]
    return 1 if differ or crashed or not size else 0


def run(args: argparse.Namespace) -> int:
    if args.command == "make":
        make(args.folder, 1 if args.quick else args.cases)
        print(f"{len(list(args.folder.glob('*.tflite')))} cases in {args.folder}")
        return 0
    if not any(args.folder.glob("*.tflite")):
        print(f"{args.folder}: no .tflite; expected what `make` wrote there", file=sys.stderr)
        return 2
    return check(args.folder)


def main() -> int:
    args = arguments()
    try:  # not `outcome.status`, which is of the package: `check` does without
        return run(args)
    except Exception:
        traceback.print_exc()
        return 2


if __name__ == "__main__":
    sys.exit(main())
