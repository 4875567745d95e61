"""Counts a process's file-system calls, and ends it at one of them."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from tests.checkpoint.ranks import KILLED

CALLS = ("fsync", "mkdir", "open", "remove", "rename", "replace", "rmdir", "truncate", "unlink")


class FileSystemCalls:
    """Within `watched`, every call that changes files (or opens a folder to sync it) is recorded
    as (name, path). At the `dies_at`-th, counted from 1, the process ends: before the call, or
    with half of the bytes written."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.log: list[tuple[str, str]] = []

    @contextmanager
    def watched(self):
        real = {name: getattr(os, name) for name in CALLS}
        real_open = io.open
        for name, function in real.items():
            setattr(os, name, self._watching(name, function))
        builtins.open = io.open = self._opening(real_open)
        try:
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)
            builtins.open = io.open = real_open

    def _count(self, name: str, path: Any, last_words: Callable[[], Any] = lambda: None) -> None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        self.log.append((name, str(path)))
        if len(self.log) == self.dies_at:
            last_words()
            os._exit(KILLED)

    def _watching(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path, *args, **kwargs):
            self._count(name, path)
            return function(path, *args, **kwargs)

        return call

    def _opening(self, real_open: Callable[..., Any]) -> Callable[..., Any]:
        count = self._count

        class File(io.FileIO):
            def write(self, data):
                half = memoryview(data)[: len(data) // 2]
                count("write", self.name, lambda: super(File, self).write(half))
                return super().write(data)

        def open_file(path, mode="r", *args, **kwargs):
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return real_open(path, mode, *args, **kwargs)
            count("create", path)
            raw = File(path, mode.replace("b", "").replace("t", ""))
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

        return open_file
