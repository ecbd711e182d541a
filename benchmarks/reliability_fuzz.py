"""Damaged and malicious files of weights and images, read in processes of their own.

Every file is made from a whole one of its kind, by a random damage that its reader does not expect
(a second one that keeps checksums and lengths right where the kind has them), or is a pickle that
would run code. Reading it must end within SECONDS_PER_FILE and MOST_MEMORY with the weights, with
the pixels, or with the reader's own error of one line. Whatever starts a program, opens a file to
write, removes one or connects to somewhere ends the reading process at once, and counts; so does
the file that the malicious pickles would make.
"""

import io
import json
import os
import pathlib
import pickle
import random
import resource
import select
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS_PER_FILE = 20.0
MOST_MEMORY = 2 * 2**30  # Beyond what the process has when it begins.
SHARE_OF_IMAGES = 0.35
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen")
FORBIDDEN += ("socket.connect", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree")
RUNS_CODE = "runs code"
ODD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1)
Case = tuple[str, bytes]
"""The suffix of a file's name, and its contents."""


class Outcome(NamedTuple):
    """What reading a file came to: "read", "refused", or else what must not happen."""

    suffix: str
    result: str
    seconds: float


# Files to begin with


def lenet() -> dict:
    """The weights of a LeNet of two classes, by PyTorch's names."""
    import numpy as np

    shapes = dict(conv1=(20, 1, 5, 5), conv2=(50, 20, 5, 5), fc1=(500, 800), fc2=(2, 500))
    random_ = np.random.default_rng(0)
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    draw = lambda shape: random_.normal(size=shape).astype(np.float32)
    return {name: draw(shape) for name, shape in {**weights, **biases}.items()}


def weight_files(folder: pathlib.Path) -> list[Case]:
    """A whole file of every kind that `dd_jax.pretrained` reads."""
    import numpy as np
    import safetensors.numpy
    import scipy.io

    sys.path.insert(0, str(ROOT / "tests"))
    import test_weight_files as written  # The tests write PyTorch's and MatConvNet's files.

    arrays, found = lenet(), []
    written.write_pth(folder / "a.pth", arrays)
    found += [(suffix, (folder / "a.pth").read_bytes()) for suffix in (".pth", ".model")]
    safetensors.numpy.save_file(arrays, folder / "a.safetensors")
    found.append((".safetensors", (folder / "a.safetensors").read_bytes()))
    net = {"net": {"layers": written.simplenn(written.lenet_filters())}}
    for is_compressed in (False, True):
        scipy.io.savemat(folder / "a.mat", net, do_compression=is_compressed)
        found.append((".mat", (folder / "a.mat").read_bytes()))
    np.savez(folder / "a.npz", **arrays)
    found += [(".npz", (folder / "a.npz").read_bytes()), (".caffemodel", caffemodel(arrays))]
    golden = sorted((ROOT / "tests/golden").glob("*.pt*"))
    return found + [
        (path.suffix, path.read_bytes()) for path in golden if path.stat().st_size < 1e7
    ]


def caffemodel(arrays: dict) -> bytes:
    """The weights in Caffe's format, in protobuf's wire format."""

    def varint(number: int) -> bytes:
        more, low = number >> 7, number & 0x7F
        return bytes([low | 0x80]) + varint(more) if more else bytes([low])

    def field(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    def blob(array) -> bytes:
        shape = field(7, field(1, b"".join(varint(size) for size in array.shape)))
        return field(7, shape + field(5, array.astype("<f4").tobytes()))

    names = dict.fromkeys(name.partition(".")[0] for name in arrays)
    layers = (
        field(1, name.encode()) + blob(arrays[f"{name}.weight"]) + blob(arrays[f"{name}.bias"])
        for name in names
    )
    return b"".join(field(100, layer) for layer in layers)


def image_files() -> list[Case]:
    """Images of the formats and modes that the decoder reads."""
    import numpy as np
    import PIL.Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    pixels[8:32] = np.arange(56, dtype=np.uint8)[None, :, None] * 4
    whole, found = PIL.Image.fromarray(pixels), []
    ways = [("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {})]
    ways += [("PNG", mode, {}) for mode in ("RGB", "P", "RGBA", "L", "1", "LA")]
    ways += [("GIF", "P", {}), ("WEBP", "RGB", {}), ("BMP", "RGB", {}), ("PPM", "RGB", {})]
    ways += [("TIFF", "RGB", {"compression": kind}) for kind in ("raw", "tiff_lzw", "jpeg")]
    for kind, mode, options in ways:
        file = io.BytesIO()
        whole.convert(mode).save(file, kind, **options)
        found.append((f".{kind.lower()}", file.getvalue()))
    return found


# What is done to them


def damaged(content: bytes, chance: random.Random) -> bytes:
    """One to three random damages, mostly near the beginning or the end."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        content = bytes(one_damage(bytearray(content), chance))
    return content


def one_damage(content: bytearray, chance: random.Random) -> bytearray:
    """A flip, an odd number, a cut, a gap, a repetition or an insertion."""
    at, kind = place(len(content), chance), chance.randrange(7)
    if kind == 0 and content:
        for _ in range(chance.choice((1, 4, 20))):
            content[place(len(content), chance)] ^= 1 << chance.randrange(8)
    elif kind == 1:
        size = chance.choice((1, 2, 4, 8))
        number = chance.choice(ODD) & (256**size - 1)
        content[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))
    elif kind == 2:
        del content[at:]
    elif kind == 3:
        del content[at : at + chance.choice((1, 4, 100, 5000))]
    elif kind == 4:
        content[at:at] = content[at : at + chance.choice((1, 8, 64, 4096))]
    elif kind == 5:
        content[at:at] = chance.randbytes(chance.choice((1, 4, 64)))
    else:
        content[at : at + 16] = chance.randbytes(16)
    return content


def place(size: int, chance: random.Random) -> int:
    """A position: a third each in the first and the last 2 KiB, and anywhere."""
    near = min(size, 2048)
    starts = (0, size - near, 0)
    which = chance.randrange(3)
    return starts[which] + chance.randrange(max(1, size if which == 2 else near))


def damaged_inside(content: bytes, chance: random.Random) -> bytes:
    """A zip archive with an entry damaged and its checksum right; a safetensors file or a PNG with
    its header damaged and the lengths and checksums right. Others: as `damaged`.
    """
    if content[:2] == b"PK":
        return with_damaged_entry(content, chance)
    if content[8:9] == b"{":
        size = int.from_bytes(content[:8], "little")
        header = damaged(content[8 : 8 + size], chance)
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    if content[:4] == b"\x89PNG":
        header = bytearray(content[16:29])
        header[chance.randrange(13)] = chance.randrange(256)
        check = struct.pack(">I", zlib.crc32(b"IHDR" + header))
        return content[:16] + bytes(header) + check + content[33:]
    return damaged(content, chance)


def with_damaged_entry(content: bytes, chance: random.Random) -> bytes:
    """The archive, written anew with one entry damaged: mostly one that describes the others."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    describing = [name for name in entries if name.endswith((".pkl", ".npy", "version"))]
    name = chance.choice(describing if chance.random() < 0.8 else list(entries))
    entries[name] = damaged(entries[name], chance)
    return archive_of(entries)


def archive_of(entries: dict[str, bytes]) -> bytes:
    """A zip archive of these entries, stored as they are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def malicious_files(canary: pathlib.Path) -> list[Case]:
    """Pickles that would make the canary's file, in every kind of file that may hold one."""
    command, program = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value.encode()
    called = [b"\x80\x02cos\nsystem\n" + text(command) + b"\x85R."]
    called += [b"\x80\x02cposix\nsystem\n" + text(command) + b"\x85R."]
    called += [b"\x80\x02cbuiltins\neval\n" + text(program) + b"\x85R."]
    called += [b"\x80\x02c__builtin__\nexec\n" + text(program) + b"\x85R."]
    called += [b"(S'" + command.encode() + b"'\nios\nsystem\n."]
    called += [b"(cos\nsystem\nS'" + command.encode() + b"'\no."]
    called += [b"\x80\x04" + text("os") + text("system") + b"\x93" + text(command) + b"\x85R."]
    called += [b"\x80\x02}" + text("a") + called[0][2:-1] + b"s."]
    called += [b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + called[0][2:-1] + b"tR."]
    called += [b"\x80\x02cnumpy.testing._private.utils\nruntests\n)R.", b"\x80\x02\x82\x01."]
    found: list[Case] = []
    for each in called:
        legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
        npy = b"\x93NUMPY\x01\x00v\x00"
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
        npy += header.ljust(0x75) + b"\n" + each
        found += [(".pth", archive_of({"archive/data.pkl": each, "archive/version": b"3\n"}))]
        found += [(".pt", each), (".pth", legacy + each), (".model", each)]
        found += [(".npz", archive_of({"conv1.weight.npy": npy})), (".safetensors", each)]
    return found


def cases(folder: pathlib.Path, count: int, seed: int, *, images: bool) -> Iterator[Case]:
    """The files to read."""
    chance = random.Random(f"{seed} {images}")
    whole = image_files() if images else weight_files(folder)
    malicious = [] if images else malicious_files(folder / "canary")
    yield from malicious[:count]
    for i in range(count - len(malicious)):
        suffix, content = whole[i % len(whole)]
        damage = damaged_inside if chance.random() < 0.4 else damaged
        yield suffix, damage(content, chance)


# Reading them


def read_weights(path: pathlib.Path) -> str:
    """Reads a file as a LeNet's weights."""
    from dd_jax import pretrained

    try:
        pretrained.load(path, "lenet")
    except pretrained.WeightsError as error:
        return "refused" if "\n" not in str(error).strip() else f"several lines: {error}"
    return "read"


def read_image(path: pathlib.Path) -> str:
    """Decodes a file as training does."""
    from dd_jax.data import decoding

    try:
        pixels = decoding.resized(path.read_bytes(), 32)
    except decoding.DecodeError as error:
        return "refused" if "\n" not in str(error).strip() else f"several lines: {error}"
    return "read" if pixels.dtype == "uint8" and min(pixels.shape[:2]) == 32 else "other pixels"


def read_all(read: Callable[[pathlib.Path], str], paths: Sequence[pathlib.Path]) -> list[Outcome]:
    """Reads files in child processes; one that must be ended is replaced by another."""
    found: list[Outcome] = []
    while len(found) < len(paths):
        found += read_in_child(read, paths[len(found) :])
    return found


def read_in_child(
    read: Callable[[pathlib.Path], str], paths: Sequence[pathlib.Path]
) -> list[Outcome]:
    """Reads files one after the other in a child process, until it ends."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _in_child(read, paths, writing)
        finally:
            os._exit(0)
    os.close(writing)
    found, buffered = [], b""
    while len(found) < len(paths):
        suffix, begun = paths[len(found)].suffix, time.monotonic()
        while b"\n" not in buffered:
            is_ready = select.select([reading], [], [], SECONDS_PER_FILE)[0]
            received = os.read(reading, 65536) if is_ready else b""
            if not received:
                os.kill(child, 9)
                status = os.waitpid(child, 0)[1]
                end = f"ended with status {status}" if is_ready else "hangs"
                os.close(reading)
                return [*found, Outcome(suffix, end, time.monotonic() - begun)]
            buffered += received
        line, _, buffered = buffered.partition(b"\n")
        found.append(Outcome(suffix, *json.loads(line)))
        if found[-1].result.startswith(RUNS_CODE):
            break  # The child has ended itself.
    os.waitpid(child, 0)
    os.close(reading)
    return found


def _in_child(
    read: Callable[[pathlib.Path], str], paths: Sequence[pathlib.Path], writing: int
) -> None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    say = lambda result, seconds: os.write(writing, json.dumps([result, seconds]).encode() + b"\n")

    def forbid(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int)
        writes = writes and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in FORBIDDEN or (writes and arguments[0] != os.devnull):
            say(f"{RUNS_CODE}: {event} {str(arguments)[:100]}", 0.0)
            os._exit(99)

    sys.addaudithook(forbid)
    warnings.simplefilter("ignore")
    for path in paths:
        begun = time.monotonic()
        try:
            result = read(path)
        except BaseException as error:
            result = f"raises {type(error).__name__}: {str(error)[:150]}"
        say(result, time.monotonic() - begun)


def fuzz_part(folder: pathlib.Path, count: int, seed: int) -> list[tuple[str, int, int, str]]:
    """Rows of the table: what, how many, how many well, and what was seen."""
    sys.path.insert(0, str(ROOT))
    num_images, rows = int(SHARE_OF_IMAGES * count), []
    for what, read, number in (
        ("weight files", read_weights, count - num_images),
        ("images", read_image, num_images),
    ):
        paths = []
        for i, (suffix, content) in enumerate(cases(folder, number, seed, images=what == "images")):
            paths.append(folder / f"{i:04}{suffix}")
            paths[-1].write_bytes(content)
        found = read_all(read, paths)
        well = [each for each in found if each.result in ("read", "refused")]
        for path, each in zip(paths, found, strict=True):
            if each not in well:
                print(f"{path}: {each.result}", flush=True)
        has_run = (folder / "canary").exists()
        kinds = Counter(each.suffix for each in found)
        results = Counter(each.result for each in well)
        slowest = max(each.seconds for each in found)
        seen = f"refused {results['refused']}, read {results['read']}; at most {slowest:.1f} s"
        seen += f"; code {'RAN' if has_run else 'never ran'}; "
        seen += ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())
        rows.append((f"fuzzed {what}", len(found), 0 if has_run else len(well), seen))
    return rows
