"""Read a checkpoint's pickles without running code that is in them.

`torch.distributed.checkpoint` keeps its `.metadata`, and this package the entries that are not
tensors, as pickles. Only plain data is read: numbers, containers, arrays, tensors, dates, and
classes of the user's own modules that are imported already.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from ditty_di.origins import is_users_own

_PLAIN = {
    "builtins": "set frozenset complex bytearray slice range dict list tuple int float bool str "
    "bytes Ellipsis NotImplemented",
    "_codecs": "encode",
    "copyreg": "_reconstructor",
    "collections": "OrderedDict defaultdict deque Counter",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "numpy": "ndarray dtype",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.numeric": "_frombuffer",
    "numpy.core.numeric": "_frombuffer",
    "torch": "Size device Tensor",
    "torch.nn.parameter": "Parameter",
    "torch.serialization": "_get_layout",
    "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_parameter _rebuild_device_tensor",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
}
_NAMES = {(module, name) for module, names in _PLAIN.items() for name in names.split()}
# Modules all of whose classes are plain data.
_RANDOM = ("_pickle", "_pcg64", "_mt19937", "_philox", "_sfc64", "bit_generator")
_DATA_MODULES = {
    "torch.distributed.checkpoint.metadata",
    "numpy.dtypes",
    *(f"numpy.random.{name}" for name in _RANDOM),
}
_BUILT_IN_OBJECT = ("builtins", "object")


class _Unpickler(pickle.Unpickler):
    """Finds plain classes only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage
        if (module, name) in _NAMES or (module, name) == _BUILT_IN_OBJECT:
            return super().find_class(module, name)
        if module in _DATA_MODULES and "." not in name:
            found = getattr(importlib.import_module(module), name, None)
            if getattr(found, "__module__", None) == module and callable(found):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        # a class of the user's own, whose module this run has imported already
        found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type) and is_users_own(found):
            return found
        raise pickle.UnpicklingError(
            f"it holds {module}.{name}, which could run code when it is read; a state_dict may "
            "hold numbers, text, containers, arrays, tensors and classes of your own modules"
        )


def loads(data: bytes) -> Any:
    """Unpickle plain data.

    Args:
        data: what `pickle.dumps` returned.

    Raises:
        pickle.UnpicklingError: it names a function or class that is not plain data.
    """
    return _Unpickler(io.BytesIO(data)).load()


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


class Reader(FileSystemReader):
    """torch's reader of a checkpoint folder, with a restricted reading of `.metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's metadata.

        Args:
            *args: ignored.
            **kwargs: `rank`, if each rank has metadata of its own.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as stream:
            metadata = loads(stream.read())
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """torch's plan of a load; an entry that is not a tensor is bytes, to be read by `loads`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put the bytes of an entry into the state dict.

        Args:
            read_item: which entry.
            value: a stream of what `torch.save` wrote.
        """
        name, packed = read_item.dest_index.fqn, torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], packed)
        else:
            self.state_dict[name] = packed
