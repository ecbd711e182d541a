"""Files of weights: what the readers make of good ones, damaged ones, and ones that would run code."""

import collections
import contextlib
import errno
import io
import os
import pickle
import struct
import sys
import types
import zipfile
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.io
import scipy.sparse
from golden import make_torch_files
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from test_pretrained import GOLDEN, lenet_state_dict

from dd_jax import models, pretrained
from dd_jax.pretrained import (
    WeightsError,
    __main__,
    caffe,
    errors,
    files,
    layouts,
    matconvnet,
    torch_legacy,
    torch_zip,
)

LENET = lenet_state_dict(num_classes=2)


class Storage:
    """Stands for a storage of PyTorch's: raw numbers under a key of the archive."""

    def __init__(self, key, array, count=None):
        self.key, self.array, self.count = key, array, len(array) if count is None else count


class Tensor:
    """Stands for a tensor: pickled as a call of PyTorch's rebuilding function."""

    def __init__(self, storage, offset, shape, strides):
        self.arguments = (storage, offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


@contextlib.contextmanager
def torchs_names():
    """Lets pickle find the names that PyTorch's pickles use."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    rebuild = lambda *arguments: None
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    torch.HalfStorage = type("HalfStorage", (), {"__module__": "torch"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        yield torch


def write_pth(path, contents, compression=zipfile.ZIP_STORED):
    """Writes what torch.save would; arrays in `contents` become tensors, each with a storage of its
    own.
    """
    storages = []

    def tensor(array):
        storages.append(Storage(str(len(storages)), array.reshape(-1)))
        strides = tuple(
            stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides
        )
        return Tensor(storages[-1], 0, array.shape, strides)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Storage):
                return None
            if value not in storages:
                storages.append(value)
            kind = torch.HalfStorage if value.array.dtype == np.float16 else torch.FloatStorage
            return "storage", kind, value.key, "cpu", value.count

    with torchs_names() as torch:
        file = io.BytesIO()
        Pickler(file, protocol=2).dump(
            jax.tree.map(lambda x: tensor(x) if isinstance(x, np.ndarray) else x, contents)
        )
    entries = {"data.pkl": file.getvalue()} | {f"data/{s.key}": s.array.tobytes() for s in storages}
    return write_archive(path, entries, compression)


def write_archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return path


def expect_lenet(variables, dtype=np.float32):
    expected = {"params": layouts.from_torch("lenet", LENET)}
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(dtype)}


# PyTorch


def test_a_file_of_pytorchs_own_gives_every_dtype_stride_and_offset():
    arrays = files.read_arrays(GOLDEN / "torch_tensors.pth", "lenet")
    assert set(arrays) == set(
        make_torch_files.CONTENTS
    )  # "module." is gone, and so is the checkpoint around
    for name, (value, dtype) in make_torch_files.CONTENTS.items():
        assert arrays[name].dtype.name == dtype and arrays[name].shape == value.shape, name
        np.testing.assert_array_equal(arrays[name].astype(np.float64), value, err_msg=name)


@pytest.mark.parametrize(
    "nest",
    ["plain", "state_dict", "model_state_dict", "model", "net", "last", "best", "both", "prefix"],
)
def test_a_state_dict_is_found_wherever_training_scripts_put_it(tmp_path, nest):
    wrap = {
        "plain": lambda weights: weights,
        "both": lambda weights: {
            "best": {name: 0 * array for name, array in weights.items()},
            "last": {"state_dict": weights},
        },
        "prefix": lambda weights: {f"module.net.{name}": array for name, array in weights.items()},
    }
    contents = (
        wrap[nest](LENET)
        if nest in wrap
        else {"epoch": 7, nest: LENET, "optimizer": {"lr": [0.1, None]}}
    )
    expect_lenet(pretrained.load(write_pth(tmp_path / "net.pth", contents), "lenet"))


def test_half_precision_is_read_as_float32(tmp_path):
    half = {name: array.astype(np.float16) for name, array in LENET.items() if array.size < 2000}
    path = write_pth(tmp_path / "net.pt", half)
    assert {array.dtype.name for array in torch_zip.read_torch_zip(path).values()} == {"float16"}
    whole = {name: np.ones(array.shape, np.float16) for name, array in LENET.items()}
    variables = pretrained.load(write_pth(tmp_path / "net.pt", whole), "lenet")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}


class Call:
    """Pickles as a call of any function whatsoever."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {marker}",), "system"),
        (eval, ("open('{marker}', 'w')",), "builtins?__.eval|builtin__.eval"),
        (open, ("{marker}", "w"), "io.open"),
        (getattr, ("", "join"), "getattr"),
        (types.SimpleNamespace, (), "types.SimpleNamespace"),
        (np.dtype, ("f4",), "numpy.dtype"),
    ],
    ids=["system", "eval", "open", "getattr", "namespace", "numpy"],
)
def test_a_pickle_that_would_call_something_is_refused_and_nothing_runs(
    tmp_path, function, arguments, named
):
    marker = tmp_path / "it_ran"
    call = Call(function, *(argument.format(marker=marker) for argument in arguments))
    for contents in (call, {"state_dict": {**LENET, "conv1.weight": call}}):
        with pytest.raises(
            WeightsError, match=f"net.pth is rejected: it asks for .*({named}), and only tensors"
        ):
            pretrained.load(write_pth(tmp_path / "net.pth", contents), "lenet")
        assert not marker.exists()


@pytest.mark.parametrize(
    "program",
    [
        # reaching through a name
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x27_rebuild_tensor_v2.__globals__.__getitem__\x93.",
        # changing it
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00functionK\x01s\x86b.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.",  # making an instance of it
        b"\x80\x02\x82\x01.",  # a registered extension
        # a storage of no type
        b"\x80\x02(X\x07\x00\x00\x00storageK\x01X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02]r\xff\xff\xff\x7f.",  # memo entry 2^31: the C implementation would reserve 16 GB
        b"\x80\x02K\x01.",  # a number
        b"\x80\x02}.",  # nothing
        b"",
        b"not a pickle",
    ],
)
def test_pickles_that_misuse_what_is_allowed_are_refused(tmp_path, program):
    path = write_archive(tmp_path / "net.pth", {"data.pkl": program, "data/0": b"1234"})
    with pytest.raises(WeightsError, match="net.pth"):
        pretrained.load(path, "lenet")
    # and nothing was changed
    assert layouts.from_torch("lenet", LENET)["conv1"]["kernel"].shape == (5, 5, 1, 20)


def test_tensors_stay_within_their_storage_and_storages_within_the_file(tmp_path):
    path, numbers = tmp_path / "net.pth", np.arange(6, dtype=np.float32)
    for arguments in ((1, (2, 3), (3, 1)), (0, (2, 3), (4, 1)), (6, (), ()), (0, (7,), (1,))):
        write_pth(path, {"x": Tensor(Storage("0", numbers), *arguments)})
        with pytest.raises(WeightsError, match="exceeds its storage of 6 numbers"):
            torch_zip.read_torch_zip(path)
    for arguments in ((-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2.0,), (1,)), (0, (2, 3), (1,))):
        write_pth(path, {"x": Tensor(Storage("0", numbers), *arguments)})
        with pytest.raises(WeightsError, match="net.pth"):
            torch_zip.read_torch_zip(path)
    write_pth(path, {"x": Tensor(Storage("0", numbers, count=600), 0, (600,), (1,))})
    with pytest.raises(WeightsError, match="storage 0 has 6 numbers instead of 600"):
        torch_zip.read_torch_zip(path)
    write_pth(path, {"x": np.zeros(1000, np.float32)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="is compressed"):
        torch_zip.read_torch_zip(path)
    with pytest.raises(WeightsError, match="without PyTorch's data.pkl"):
        torch_zip.read_torch_zip(write_archive(path, {"code.py": b""}))


def test_tensors_have_no_more_numbers_than_their_storage_but_may_share_it(tmp_path):
    path, numbers = tmp_path / "net.pth", np.arange(2000, dtype=np.float32)
    shared = Storage("0", numbers)
    views = {
        "a": ((40, 50), (50, 1)),
        "b": ((50, 40), (1, 50)),
        "c": ((3, 100), (0, 1)),
        "none": ((0, 5), (5, 1)),
    }
    arrays = torch_zip.read_torch_zip(
        write_pth(path, {name: Tensor(shared, 0, *view) for name, view in views.items()})
    )
    np.testing.assert_array_equal(arrays["b"], arrays["a"].T)
    # as Tensor.expand makes it
    np.testing.assert_array_equal(arrays["c"], np.broadcast_to(numbers[:100], (3, 100)))
    assert arrays["none"].shape == (0, 5)
    for shape, strides, words in (
        ((10**6, 10**6), (0, 0), "claims 1000000000000 numbers of a storage of 2000"),
        ((2001, 1), (0, 1), "claims 2001 numbers"),
        ((2000, 2), (1, 0), "claims 4000 numbers"),
        ((1,) * 9, (1,) * 9, "at most 8 axes"),
    ):
        with pytest.raises(WeightsError, match=words):
            torch_zip.read_torch_zip(write_pth(path, {"x": Tensor(shared, 0, shape, strides)}))
    # An empty array may have any number of rows, and does not tell how many classes there are.
    with pytest.raises(
        WeightsError, match=r"fc2.weight \(576460752303423488, 0\) instead of \(10, 500\)"
    ):
        layouts.variables_from_torch("lenet", LENET | {"fc2.weight": np.zeros((2**59, 0), np.int8)})


def nested_tuple(levels):
    """The program for a tuple of two that are each the same tuple of two ...: 2^levels to hash or
    to write out.
    """
    return b")q\x00" + b"h\x00\x86q\x00" * levels


def test_shared_tuples_are_neither_hashed_nor_written_out(tmp_path):
    nested = nested_tuple(60)
    path, ordered = tmp_path / "net.pth", b"ccollections\nOrderedDict\n"
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    for program, words in (
        (b"}" + nested + b"K\x01s.", "a key of type tuple"),
        (b"}(" + nested + b"K\x01u.", "a key of type tuple"),
        (ordered + b"](" + nested + b"K\x01\x86e\x85R.", "a key of type tuple"),
        (
            ordered + b"]" + nested + b"aK\x01K\x02\x86a\x85R.",
            "a key of type tuple|not consist of pairs",
        ),
        # 2^64 - 1: its hash is that of 7
        (b"}\x8a\x09" + b"\xff" * 8 + b"\x00K\x01s.", "a key of type int"),
        (b"(" + nested + b"NNNNtQ.", "it refers to tuple"),
        (storage + nested + b"tQ.", "it refers to storage"),
        (
            b"}(" + b"".join(b"J" + bytes([i, 0, 0, 1]) + b")" for i in range(99)) + b"u.",
            "and 94 more among",
        ),
        (nested + b".", "holds no state dict"),
    ):
        write_archive(path, {"data.pkl": b"\x80\x02" + program, "data/0": b"1234"})
        with pytest.raises(WeightsError, match=words) as caught:
            torch_zip.read_torch_zip(path)
        assert len(str(caught.value)) < 600
    for key in ("x" * 10**5, 12):
        with pytest.raises(WeightsError, match="among its tensors") as caught:
            torch_zip.read_torch_zip(write_pth(path, {key: (1, 2)}))
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "program",
    [
        # BYTEARRAY8 of 3 GB, which Python's own reserves before it reads
        b"\x96" + (3 * 10**9).to_bytes(8, "little"),
        b"\x8e" + b"\xff" * 7 + b"\x7f",  # BINBYTES8
        b"\x8d" + b"\xff" * 7 + b"\x7f",  # BINUNICODE8
        b"\x95" + b"\xff" * 7 + b"\x7f",  # FRAME
        b"\x97",  # NEXT_BUFFER
        b"N\x98",  # READONLY_BUFFER
        b"(ios\nsystem\n",  # INST
        b"(cos\nsystem\no",  # OBJ
        b")\x81",  # NEWOBJ
        b"\x8f(\x90",  # a set
        b"]2",  # DUP
    ],
)
def test_instructions_that_torch_save_does_not_write_are_refused(tmp_path, program):
    path = write_archive(tmp_path / "net.pth", {"data.pkl": b"\x80\x05" + program + b"."})
    with pytest.raises(WeightsError, match="has the instruction 0x..|asks for os.system"):
        torch_zip.read_torch_zip(path)


def test_entries_of_an_archive_come_to_no_more_than_the_file(tmp_path):
    path = write_pth(tmp_path / "net.pth", LENET)
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\1\2")
    content[directory + 24 : directory + 28] = (2**31).to_bytes(4, "little")  # the size of data.pkl
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="together larger than the file"):
        torch_zip.read_torch_zip(path)


def test_what_is_no_tensor_is_named(tmp_path):
    path = write_pth(
        tmp_path / "net.pth", {"conv1.weight": np.ones(3, np.float32), "epoch": 3, "best": "yes"}
    )
    with pytest.raises(WeightsError, match="net.pth has best, epoch among its tensors"):
        torch_zip.read_torch_zip(path)


def test_a_damaged_pickle_never_raises_anything_else(tmp_path):
    with zipfile.ZipFile(GOLDEN / "torch_tensors.pth") as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    generator, refused = np.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(entries["data.pkl"])
        damaged[generator.integers(len(damaged))] = generator.integers(256)
        path = write_archive(tmp_path / "net.pth", entries | {"data.pkl": bytes(damaged)})
        try:
            torch_zip.read_torch_zip(path)
        except WeightsError:
            refused += 1
    assert refused > 60  # The others changed a number or a name, as far as a reader can tell.


def test_the_old_format_is_read_without_pytorch_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    arrays = files.read_arrays(GOLDEN / "torch_tensors_legacy.pth", "lenet")
    assert set(arrays) == set(make_torch_files.CONTENTS)
    for name, (value, dtype) in make_torch_files.CONTENTS.items():
        assert arrays[name].dtype.name == dtype and arrays[name].shape == value.shape, name
        np.testing.assert_array_equal(arrays[name].astype(np.float64), value, err_msg=name)
        assert not (arrays[name].size and arrays[name].flags.writeable), name


def test_every_damage_to_a_file_of_the_old_format_is_a_sentence(tmp_path):
    content = (GOLDEN / "torch_tensors_legacy.pth").read_bytes()
    path, generator, refused = tmp_path / "net.pth", np.random.default_rng(0), 0
    for length in (0, 1, 14, 15, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match="net.pth"):
            files.read_arrays(path, "lenet")
    for _ in range(200):
        damaged = bytearray(content)
        damaged[generator.integers(len(content))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            torch_legacy.read_torch_legacy(path)
        except WeightsError:
            refused += 1
    assert refused > 60  # The others changed a number or a name, as far as a reader can tell.


def legacy_file(path, *pickles, tail=b""):
    """A file of the old format from the programs of its pickles after the first two."""
    start = torch_legacy.MAGIC + pickle.dumps(1001, 2)
    path.write_bytes(start + b"".join(pickles) + tail)
    return path


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"


@pytest.mark.parametrize(
    ("contents", "keys", "tail", "words"),
    [
        # 2^60 numbers, and -1
        (b"\x80\x02" + STORAGE + b"\x8a\x08" + (2**60).to_bytes(8, "little") + b"NtQ.", [], b"", "claims 1152921504606846976 numbers"),
        (b"\x80\x02" + STORAGE + b"J\xff\xff\xff\xffNtQ.", [], b"", "claims -1 numbers"),
        (b"\x80\x02" + STORAGE + b"K\x01NtQ.", ["0"], b"\2" + bytes(7) + b"1234", "not the 1 numbers"),
        (b"\x80\x02" + STORAGE + b"K\x01NtQ.", ["0"], b"\1" + bytes(7) + b"12", "not the 1 numbers"),
        (b"\x80\x02" + STORAGE + b"K\x01NtQ.", ["9"], b"", "storage 9 belongs to no tensor"),
        (b"\x80\x02" + STORAGE + b"K\x01NtQ.", [], b"", "KeyError"),
        (b"\x80\x02" + STORAGE + b"K\x01NtQ.", 7, b"", "list of storages"),
        (b"\x80\x02" + STORAGE + b"K\x01K\x01tQ.", [], b"", "refers to storage"),  # a view
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", [], b"", "asks for os.system"),
    ],
)  # fmt: skip
def test_storages_of_the_old_format_stay_within_the_file(tmp_path, contents, keys, tail, words):
    machine = pickle.dumps({"little_endian": True}, 2)
    path = legacy_file(tmp_path / "net.pth", machine, contents, pickle.dumps(keys, 2), tail=tail)
    with pytest.raises(WeightsError, match=f"net.pth is .*{words}"):
        files.read_arrays(path, "lenet")


@pytest.mark.parametrize("suffix", [suffix for suffix in files.SUFFIXES])
@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><html><head><title>Google Drive", b"\xef\xbb\xbf\n <HTML>"]
)
def test_a_web_page_in_place_of_weights_is_recognized(tmp_path, suffix, page):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(page + b" - Virus scan warning</title>")
    with pytest.raises(WeightsError, match=f"net{suffix} is a web page .*Google Drive.*gdown"):
        pretrained.load(path, "lenet")


# Caffe


@pytest.fixture(scope="module")
def caffe_net():
    """protobuf's own NetParameter, of the part of caffe.proto that matters."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="caffe_part.proto", package="caffe", syntax="proto2"
    )
    kinds = {
        "int": field.TYPE_INT64,
        "text": field.TYPE_STRING,
        "float": field.TYPE_FLOAT,
        "double": field.TYPE_DOUBLE,
    }

    def message(name, /, **fields):
        made = file.message_type.add(name=name)
        for key, (number, kind) in fields.items():
            repeated, kind = kind.startswith("*"), kind.lstrip("*").rstrip("!")
            added = made.field.add(
                name=key, number=number, type=kinds.get(kind, field.TYPE_MESSAGE)
            )
            added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            added.options.packed = repeated and kind in kinds and not fields[key][1].endswith("!")
            if kind not in kinds:
                added.type_name = f".caffe.{kind}"

    message("Shape", dim=(1, "*int"))
    message(
        "Blob", num=(1, "int"), channels=(2, "int"), height=(3, "int"), width=(4, "int"),
        data=(5, "*float"), diff=(6, "*float"), shape=(7, "Shape"), double_data=(8, "*double"),
    )  # fmt: skip
    message(
        "LooseBlob",
        num=(1, "int"),
        channels=(2, "int"),
        height=(3, "int"),
        width=(4, "int"),
        data=(5, "*float!"),
    )
    message("Layer", name=(1, "text"), type=(2, "text"), blobs=(7, "*Blob"))
    message("V0", name=(1, "text"))
    message(
        "V1",
        v0=(1, "V0"),
        bottom=(2, "*text"),
        name=(4, "text"),
        type=(5, "int"),
        blobs=(6, "*Blob"),
        decay=(8, "*float!"),
    )
    message(
        "Net", name=(1, "text"), layers=(2, "*V1"), input_dim=(4, "*int!"), layer=(100, "*Layer")
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return lambda name="Net": message_factory.GetMessageClass(
        pool.FindMessageTypeByName(f"caffe.{name}")
    )()


def lenet_caffemodel(net, old, double=False):
    """LeNet as Caffe stores it: with input and ReLU layers between, and in the old format with
    shapes of rank 4.
    """
    net.name = "LeNet"
    (net.layers if old else net.layer).add(name="data")
    for layer in ("conv1", "conv2", "fc1", "fc2"):
        made = (net.layers if old else net.layer).add(name=layer)
        for leaf in ("weight", "bias"):
            array = LENET[f"{layer}.{leaf}"]
            blob = made.blobs.add()
            (blob.double_data if double else blob.data).extend(array.reshape(-1).tolist())
            if old:
                blob.num, blob.channels, blob.height, blob.width = (1,) * (
                    4 - array.ndim
                ) + array.shape
            else:
                blob.shape.dim.extend(array.shape)
        (net.layers if old else net.layer).add(name=f"relu_{layer}")
    if old:
        net.input_dim.extend((1, 1, 28, 28))
        net.layers[1].decay.extend((1.0, 0.0))
    return net.SerializeToString()


@pytest.mark.parametrize(("old", "double"), [(False, False), (True, False), (False, True)])
def test_caffes_files_are_read(tmp_path, caffe_net, old, double):
    path = tmp_path / "lenet.caffemodel"
    path.write_bytes(lenet_caffemodel(caffe_net(), old, double))
    expect_lenet(pretrained.load(path, "lenet"))


def test_numbers_need_not_be_packed(caffe_net):
    blob = caffe_net("LooseBlob")
    blob.num, blob.channels, blob.height, blob.width = 1, 1, 2, 3
    blob.data.extend(range(6))
    array = caffe._array(memoryview(blob.SerializeToString()), "x")
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.float32).reshape(2, 3))


def test_caffes_oldest_format_and_wrong_sizes_are_refused(tmp_path, caffe_net):
    path, net = tmp_path / "net.caffemodel", caffe_net()
    net.layers.add().v0.name = "conv1"
    path.write_bytes(net.SerializeToString())
    with pytest.raises(WeightsError, match="format of 2013; run Caffe's upgrade_net_proto_binary"):
        caffe.read_caffemodel(path)
    net = caffe_net()
    blob = net.layer.add(name="conv1").blobs.add(data=[1.0, 2.0, 3.0])
    blob.shape.dim.extend((2, 2))
    path.write_bytes(net.SerializeToString())
    with pytest.raises(WeightsError, match=r"conv1.weight has 3 numbers.*shape \(2, 2\)"):
        caffe.read_caffemodel(path)
    for content in (b"", b"\xff" * 30, b"hello, caffe", b"\x08"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="net.caffemodel cannot be read"):
            caffe.read_caffemodel(path)


def varint(number):
    low = bytes([number & 127 | (128 if number > 127 else 0)])
    return low + varint(number >> 7) if number > 127 else low


def message_field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (message_field(7, message_field(1, varint(2**63 + 1) * 10**4)), "more than 8 axes"),
        (message_field(7, message_field(1, b"\x01" * 100)), "more than 8 axes"),
        (
            message_field(7, message_field(1, b"\x01")) * 9,
            r"1 numbers.*\(1, 1, 1, 1, 1, 1, 1, 1, 1\)",
        ),
        (
            message_field(7, message_field(1, varint(0) + varint(2**62) * 2)),
            r"1 numbers.*shape \(0, 4611686018427387904",
        ),
        (message_field(1, b"abc"), "bytes instead of an integer"),
        (varint(1 << 3) + varint(2**69), "1 numbers"),
    ],
)
def test_caffes_shapes_are_checked_before_they_are_multiplied(tmp_path, blob, words):
    path, layer = tmp_path / "net.caffemodel", message_field(1, b"conv1")
    path.write_bytes(
        message_field(100, layer + message_field(7, message_field(5, bytes(4)) + blob))
    )
    with pytest.raises(WeightsError, match=f"net.caffemodel cannot be read.*{words}"):
        caffe.read_caffemodel(path)


def test_whatever_else_fails_in_a_caffemodel_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "net.caffemodel").write_bytes(b"")
    monkeypatch.setattr(caffe, "_weights", lambda net: [1])
    with pytest.raises(
        WeightsError, match="net.caffemodel is damaged or not a .caffemodel .TypeError"
    ):
        caffe.read_caffemodel(tmp_path / "net.caffemodel")


# MatConvNet


def simplenn(weights, field="weights"):
    """A cell array of layers as MatConvNet's: those with weights, each followed by one without."""
    layers = []
    for filters, biases in weights:
        if field == "weights":
            pair = np.empty((1, 2), object)
            pair[0, 0], pair[0, 1] = filters, biases[None]
            layers.append({"type": "conv", "weights": pair, "stride": np.ones((1, 2))})
        else:
            layers.append({"type": "conv", "filters": filters, "biases": biases[None]})
        layers.append({"type": "relu"})
    cell = np.empty((1, len(layers)), object)
    cell[0, :] = layers
    return cell


def lenet_filters():
    """LeNet's weights as MatConvNet has them: (height, width, in, out), of linear layers too."""
    torchs = {
        layer: (LENET[f"{layer}.weight"], LENET[f"{layer}.bias"])
        for layer in ("conv1", "conv2", "fc1", "fc2")
    }
    whole = {"fc1": (500, 50, 4, 4), "fc2": (2, 500, 1, 1)}
    return [
        (w.reshape(whole.get(layer, w.shape)).transpose(2, 3, 1, 0), b)
        for layer, (w, b) in torchs.items()
    ]


@pytest.mark.parametrize(
    ("field", "nested"), [("weights", True), ("weights", False), ("filters", True)]
)
def test_matconvnets_files_are_read(tmp_path, field, nested):
    net = {"layers": simplenn(lenet_filters(), field), "meta": {"epoch": 3.0}}
    scipy.io.savemat(tmp_path / "lenet.mat", {"net": net} if nested else net)
    expect_lenet(pretrained.load(tmp_path / "lenet.mat", "lenet"))


def test_layers_are_named_in_the_order_in_which_the_net_runs_through_them():
    order = ["conv1", "cccp1", "cccp2", "conv2", "cccp3", "cccp4", "conv3", "cccp5", "cccp6"]
    assert layouts.layer_names("nin") == order
    assert layouts.layer_names("alexnet") == [
        *(f"conv{i}" for i in range(1, 6)),
        "fc6",
        "fc7",
        "fc8",
    ]


def test_filters_imported_from_caffe_are_turned_back_to_bgr(tmp_path):
    filters = np.arange(2 * 2 * 3 * 4, dtype=np.float32).reshape(2, 2, 3, 4)
    pairs = [
        (filters, np.ones(4, np.float32)),
        (filters.reshape(2, 2, 4, 3), np.ones(3, np.float32)),
    ]
    scipy.io.savemat(tmp_path / "net.mat", {"layers": simplenn(pairs)})
    arrays = matconvnet.read_mat(tmp_path / "net.mat", ["a"], reverse_channels=True)
    assert list(arrays) == ["a.weight", "a.bias", "extra1.weight", "extra1.bias"]
    assert arrays["a.weight"][3, 0, 1, 0] == filters[1, 0, 2, 3]
    assert arrays["extra1.weight"][2, 0, 1, 0] == filters.reshape(2, 2, 4, 3)[1, 0, 0, 2]
    with pytest.raises(WeightsError, match="missing: conv3.weight.*fc8.bias"):  # alexnet's, by name
        pretrained.load(tmp_path / "net.mat", "alexnet")


def test_other_matlab_files_are_refused(tmp_path):
    path = tmp_path / "net.mat"
    scipy.io.savemat(path, {"images": np.ones(3)})
    with pytest.raises(WeightsError, match="does not hold a SimpleNN net"):
        pretrained.load(path, "lenet")
    normalized = np.empty((1, 3), object)
    # of a layer with moments
    normalized[0, :] = [np.ones((2, 2, 1, 3)), np.ones(3), np.ones((3, 2))]
    scipy.io.savemat(path, {"layers": np.array([[{"weights": normalized}]], object)})
    with pytest.raises(WeightsError, match="does not hold a SimpleNN net"):
        pretrained.load(path, "lenet")
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(64))
    with pytest.raises(
        WeightsError, match=r"MATLAB 7.3 file.*save it again with save\(..., '-v7'\)"
    ):
        pretrained.load(path, "lenet")


@pytest.mark.parametrize("compressed", [False, True])
def test_variables_of_matlab_files_are_bounded_and_others_not_read(
    tmp_path, monkeypatch, compressed
):
    path, net = tmp_path / "lenet.mat", {"layers": simplenn(lenet_filters())}
    scipy.io.savemat(
        path, {"junk": np.zeros(10**6), "net": net, "more": np.ones(3)}, do_compression=compressed
    )
    monkeypatch.setattr(errors, "MOST_UNCOMPRESSED", 2 * 10**6)  # less than junk, more than the net
    expect_lenet(pretrained.load(path, "lenet"))
    monkeypatch.setattr(errors, "MOST_UNCOMPRESSED", 10**6)
    with pytest.raises(
        WeightsError, match="lenet.mat is damaged.*have more than the 1000000 bytes"
    ):
        pretrained.load(path, "lenet")


def matlab_element(kind, content, order="<"):
    return struct.pack(f"{order}II", kind, len(content)) + content.ljust(
        -(-len(content) // 8) * 8, b"\0"
    )


def matlab_array(array_class, dimensions, *rest, name=b"", order="<"):
    """What follows the tag of an array of that class and those dimensions; `rest` has types and
    contents.
    """
    flags, dimensions = (
        struct.pack(f"{order}II", array_class, 0),
        struct.pack(f"{order}{len(dimensions)}i", *dimensions),
    )
    return b"".join(
        matlab_element(*part, order) for part in ((6, flags), (5, dimensions), (1, name), *rest)
    )


def matlab_file(*array, order="<"):
    """A file whose one variable is called `layers`."""
    header = b"MATLAB 5.0".ljust(124) + (b"\x00\x01IM" if order == "<" else b"\x01\x00MI")
    return header + matlab_element(14, matlab_array(*array, name=b"layers", order=order), order)


@pytest.mark.parametrize("order", "<>")
def test_matlab_stores_floats_as_short_integers_in_either_byte_order(tmp_path, order):
    def inner(*array):
        return 14, matlab_array(*array, order=order)

    filters = inner(6, (3, 2), (3, struct.pack(f"{order}6h", *range(-3, 3))))
    biases = inner(7, (1, 1), (7, struct.pack(f"{order}f", 0.5)))
    name_length = struct.pack(f"{order}i", 8)
    layer = inner(2, (1, 1), (5, name_length), (1, b"weights\0"), inner(1, (1, 2), filters, biases))
    (tmp_path / "net.mat").write_bytes(matlab_file(1, (1, 1), layer, order=order))
    arrays = matconvnet.read_mat(tmp_path / "net.mat", ["conv1"])
    np.testing.assert_array_equal(arrays["conv1.weight"][0, 0], [[-3, 0], [-2, 1], [-1, 2]])
    assert arrays["conv1.weight"].dtype == np.float64 and arrays["conv1.bias"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            matlab_file(6, (2**30, 2**30), (9, bytes(8))),
            "1 numbers in it do not make an array of shape",
        ),
        (matlab_file(6, (-1, 1), (9, bytes(8))), "do not make"),
        (matlab_file(7, (1,) * 10, (2, b"1")), "do not make"),
        (matlab_file(6, (2**18, 1), (2, bytes(2**18))), "have more than the 1000000 bytes"),
        (
            matlab_file(2, (2**30, 1), (5, b"\1\0\0\0"), (1, b"a" * 200_000)),
            "more than 1000 fields",
        ),
        (matlab_file(2, (1, 1), (5, bytes(4)), (1, b"a")), "fields"),
        (matlab_file(1, (1, 1), *[(14, b"")] * 50), "more than 50 arrays"),
        (matlab_file(1, (1, 1), (9, bytes(8))), "something that is not an array"),
        (matlab_file(1, (1, 1), (14, bytes(4))), "requires a buffer"),
    ],
)
def test_arrays_of_matlab_files_do_not_claim_more_than_a_net_has(
    tmp_path, monkeypatch, content, words
):
    monkeypatch.setattr(errors, "MOST_UNCOMPRESSED", 10**6)
    monkeypatch.setattr(matconvnet, "_MOST_ARRAYS", 50)
    path = tmp_path / "net.mat"
    packed = zlib.compress(content[128:])
    for variable in (content, content[:128] + struct.pack("<II", 15, len(packed)) + packed):
        path.write_bytes(variable)
        with pytest.raises(WeightsError, match=f"net.mat is damaged.*{words}"):
            pretrained.load(path, "lenet")


def test_cells_in_cells_and_filters_of_five_axes_are_refused(tmp_path):
    path, cell = tmp_path / "net.mat", np.ones((1, 1))
    for _ in range(30):
        outer = np.empty((1, 1), object)
        outer[0, 0] = cell
        cell = outer
    for layers, words in (
        (cell, "more than 20 nested levels"),
        (
            simplenn([(np.ones((2,) * 5), np.ones(2))]),
            r"filters of a layer have shape \(2, 2, 2, 2, 2\)",
        ),
        (np.array([["hello"]], object), "does not hold a SimpleNN"),
        (np.array([[scipy.sparse.eye(2)]], object), "does not hold a SimpleNN"),
        (
            simplenn([(np.ones((2, 2)), np.ones(2)), (scipy.sparse.eye(2).tocsc(), np.ones(2))]),
            "other weights than filters",
        ),
    ):
        scipy.io.savemat(path, {"layers": layers})
        with pytest.raises(WeightsError, match=f"net.mat .*{words}"):
            pretrained.load(path, "lenet")


def test_a_changed_byte_of_a_matlab_file_never_raises_anything_else(tmp_path):
    path, generator = tmp_path / "net.mat", np.random.default_rng(0)
    small = {"layers": simplenn([(np.ones((2, 2, 1, 2), np.float32), np.ones(2))])}
    scipy.io.savemat(path, small)
    content = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.integers(128, len(damaged))] = generator.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(WeightsError):
            matconvnet.read_mat(path, ["conv1"])
    path.write_bytes(content)
    assert list(matconvnet.read_mat(path, ["conv1"])) == ["conv1.weight", "conv1.bias"]


# NumPy


def npy(shape, dtype="<f4", content=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + content


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"x.npy": npy((10**5,), content=bytes(4 * 10**5))},
            "have 400128 bytes, and 300000 are allowed",
        ),
        ({"fc9.weight.npy": npy((2,), content=bytes(8))}, r"missing: .*unknown: fc9.weight \(2,\)"),
        ({"x.npy": npy((10**9, 10**9))}, "x.npy has not the length of an array of shape"),
        ({"x.npy": npy((-1, 0))}, "x.npy has not the length|shape"),
        ({"x.npy": npy((2,), "|O", bytes(16))}, "x.npy has dtype object"),
        ({"x.npy": npy((2,), "<c8", bytes(16))}, "x.npy has dtype complex64"),
        ({"x.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"}, r"version \(2, 0\)"),
        ({"x.txt": b"hello"}, "x.txt is not an array"),
    ],
)
def test_npz_files_are_refused_by_their_headers(tmp_path, monkeypatch, entries, words):
    monkeypatch.setattr(errors, "MOST_UNCOMPRESSED", 300_000)
    monkeypatch.setattr(
        files, "_npy_array", lambda archive, name: pytest.fail(f"{name} was decompressed")
    )
    with zipfile.ZipFile(tmp_path / "net.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(WeightsError, match=f"net.npz.*{words}"):
        pretrained.load(tmp_path / "net.npz", "lenet")


def test_compressed_npz_files_are_read(tmp_path):
    np.savez_compressed(
        tmp_path / "lenet.npz", **{name: np.asfortranarray(array) for name, array in LENET.items()}
    )
    expect_lenet(pretrained.load(tmp_path / "lenet.npz", "lenet"))


# All kinds


def written(directory, kind, caffe_net):
    path = directory / f"lenet.{kind}"
    if kind in ("pth", "model", "tar", "ckpt"):
        write_pth(path, LENET)
    elif kind == "safetensors":
        safetensors.numpy.save_file(LENET, path)
    elif kind == "caffemodel":
        path.write_bytes(lenet_caffemodel(caffe_net(), old=False))
    elif kind == "mat":
        scipy.io.savemat(path, {"net": {"layers": simplenn(lenet_filters())}})
    else:
        np.savez(path, **LENET)
    return path


each_kind = pytest.mark.parametrize(
    "kind", [suffix[1:] for suffix in files.SUFFIXES if suffix != ".pt"]
)


@each_kind
def test_whole_files_load_truncated_ones_are_refused(tmp_path, monkeypatch, caffe_net, kind):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = written(tmp_path, kind, caffe_net)
    expect_lenet(pretrained.load(path, "lenet"))
    content = path.read_bytes()
    for length in (0, 1, 4, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=f"lenet.{kind}") as caught:
            pretrained.load(path, "lenet")
        assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("kind", ["pth", "npz"])
def test_a_flipped_bit_among_the_numbers_is_noticed_where_there_is_a_checksum(
    tmp_path, caffe_net, kind
):
    path = written(tmp_path, kind, caffe_net)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"lenet.{kind} is damaged.*CRC"):
        pretrained.load(path, "lenet")


@pytest.mark.parametrize("kind", ["pth", "safetensors", "caffemodel", "npz"])
def test_one_error_lists_all_that_does_not_fit(tmp_path, monkeypatch, caffe_net, kind):
    monkeypatch.setitem(LENET, "fc1.bias", np.zeros(77, np.float32))
    path = written(tmp_path, kind, caffe_net)
    with pytest.raises(WeightsError) as caught:
        pretrained.load(path, "mlp")
    for word in (
        f"lenet.{kind}: ",
        "missing: ",
        "fc3.weight (10, 150)",
        "unknown: ",
        "of another shape: ",
        "fc1.bias (77,)",
    ):
        assert word in str(caught.value)


def test_unknown_kinds_absent_files_and_unknown_nets_are_said(tmp_path):
    with pytest.raises(
        WeightsError,
        match=r"net.h5 has an unknown suffix; .*\.pth \(PyTorch\).*\.mat \(MatConvNet\)",
    ):
        pretrained.load(tmp_path / "net.h5", "lenet")
    with pytest.raises(WeightsError, match="There is no file .*net.pth"):
        pretrained.load(tmp_path / "net.pth", "lenet")
    safetensors.numpy.save_file(LENET, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match="'vgg'.*mlp, lenet, convnet, nin, alexnet"):
        pretrained.load(tmp_path / "net.safetensors", "vgg")


@each_kind
def test_what_the_system_refuses_is_said(tmp_path, monkeypatch, kind):
    path = tmp_path / f"lenet.{kind}"
    path.write_bytes(b"x")

    def refuse(self, *arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(type(path), "open", refuse)  # Permissions do not bind root.
    with pytest.raises(
        WeightsError,
        match=f"lenet.{kind} cannot be read .Permission denied.; check its permissions",
    ):
        pretrained.load(path, "lenet")


def test_bfloat16_goes_through_safetensors(tmp_path):
    arrays = {
        "count": np.array(3),
        "x": np.arange(6, dtype=np.float32).astype(jax.numpy.bfloat16).reshape(2, 3).T,
    }
    files.save_safetensors(tmp_path / "x.safetensors", arrays)
    read, count = (
        files.read_arrays(tmp_path / "x.safetensors", "lenet")[name] for name in ("x", "count")
    )
    assert (
        read.dtype == jax.numpy.bfloat16
        and read.shape == (3, 2)
        and float(read[1, 1]) == 4
        and count.shape == ()
    )


# The command


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["dd_jax.pretrained", *map(str, arguments)])
    __main__.main()


def test_the_command_converts(tmp_path, monkeypatch, capsys):
    source = write_pth(
        tmp_path / "in.pth",
        {"state_dict": {f"module.{name}": array for name, array in LENET.items()}},
    )
    target = tmp_path / "out.safetensors"
    run_command(monkeypatch, source, "--model", "lenet", target)
    assert capsys.readouterr().out == f"{target} holds the 8 arrays of lenet.\n"
    jax.tree.map(np.testing.assert_array_equal, safetensors.numpy.load_file(target), LENET)
    expect_lenet(pretrained.load(target, "lenet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]


@pytest.mark.parametrize(
    ("model", "target", "sentence"),
    [
        ("mlp", "out.safetensors", "missing: .*unknown: "),
        ("lenet", "out.pth", "give it a name that ends in .safetensors"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(
    tmp_path, monkeypatch, model, target, sentence
):
    source = write_pth(tmp_path / "in.pth", LENET)
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        run_command(monkeypatch, source, "--model", model, tmp_path / target)
    assert not (tmp_path / target).exists()


def test_statistics_of_batch_normalization_are_variables_too():
    model, name = models.create("resnet18", num_classes=3), "resnet18"
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    assert len(shapes) == 62 + 40
    entries = {
        layouts._entry(name, path): layouts._torch_shape(s)
        for path, s in layouts._expected_shapes(name, 3).items()
    }
    assert {
        "layer1.0.bn1.running_mean",
        "layer2.0.downsample.0.weight",
        "layer4.0.downsample.1.running_var",
    } < set(entries)
    arrays = {entry: np.broadcast_to(np.float32(0), shape) for entry, shape in entries.items()}
    arrays |= {
        entry.replace("running_mean", "num_batches_tracked"): np.array(1)
        for entry in entries
        if "mean" in entry
    }
    variables = layouts.variables_from_torch(name, arrays)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, expected)
