"""What others offer for random access to large samples, each used as its documentation says, in one process.

All are given the same samples: the rows of all levels of one image as fp16, in one piece. What a library returns is
copied into the sample's row of a batch buffer, as our reader's is, unless the library can read into it.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import safetensors.numpy
import torch

SHARD_BYTES = 256 * 2**20


class Peer(ABC):
    """One way to store and read samples. `write` is called once, `open` before every first pass."""

    name: ClassVar[str]
    module: ClassVar[str]
    package: ClassVar[str]
    sequential: ClassVar[bool] = False
    """Whether samples only come in the order in which they were written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def missing(cls) -> str:
        """Why this peer is not measured; empty where it is installed."""
        if importlib.util.find_spec(cls.module) is not None:
            return ""
        return f"not installed: pip install --no-deps {cls.package} (benchmarks/peers.txt)"

    @property
    def library(self) -> Any:
        """The library, which only the peers' environment has."""
        return importlib.import_module(self.module)

    @abstractmethod
    def write(self, samples: Sequence[np.ndarray]) -> None:
        """Store (n,) uint8 samples of one length below `folder`, which is new."""

    @abstractmethod
    def open(self) -> None:
        """Make ready to read."""

    @abstractmethod
    def read(self, number: int, out: np.ndarray) -> None:
        """Fill `out` with a sample. Where `sequential`, with the next one."""

    def close(self) -> None:
        """Let go of everything."""
        for name in [name for name in vars(self) if name != "folder"]:
            delattr(self, name)


class Memmap(Peer):
    """One file of equal rows."""

    name, module, package = "np.memmap", "numpy", "numpy"

    def write(self, samples: Sequence[np.ndarray]) -> None:
        with (self.folder / "all.bin").open("wb") as file:
            for sample in samples:
                file.write(sample.data)
        (self.folder / "length").write_text(str(len(samples[0])))

    def open(self) -> None:
        shape = (-1, int((self.folder / "length").read_text()))
        self.rows = np.memmap(self.folder / "all.bin", np.uint8, "r").reshape(shape)

    def read(self, number: int, out: np.ndarray) -> None:
        np.copyto(out, self.rows[number])


class HfDatasets(Peer):
    """The Arrow table of a data set on disk: the fastest of its formats."""

    name, module, package = "datasets (arrow)", "datasets", "datasets"

    def write(self, samples: Sequence[np.ndarray]) -> None:
        self._save([pa.array([sample.tobytes()], pa.large_binary()) for sample in samples])

    def open(self) -> None:
        self.rows = self.library.load_from_disk(str(self.folder / "set")).with_format("arrow")

    def read(self, number: int, out: np.ndarray) -> None:
        column: pa.Array = self.rows[number]["feat"].chunk(0)
        _, offsets, data = column.buffers()
        start, end = np.frombuffer(offsets, np.int64)[column.offset : column.offset + 2]
        np.copyto(out, np.frombuffer(data, np.uint8)[start:end])

    def _save(self, chunks: Sequence[pa.Array]) -> None:
        self.library.disable_progress_bars()
        table = self.library.table.InMemoryTable(pa.table({"feat": pa.chunked_array(chunks)}))
        self.library.Dataset(table).save_to_disk(str(self.folder / "set"))


class HfTorch(HfDatasets):
    """The same with the format that training scripts choose."""

    name = "datasets (torch)"

    def write(self, samples: Sequence[np.ndarray]) -> None:
        values = [pa.array(sample.view(np.float16), pa.float16()) for sample in samples]
        self._save([pa.FixedSizeListArray.from_arrays(one, len(one)) for one in values])

    def open(self) -> None:
        found = self.library.load_from_disk(str(self.folder / "set"))
        self.rows = found.with_format("torch", dtype=torch.float16)

    def read(self, number: int, out: np.ndarray) -> None:
        np.copyto(out.view(np.float16), self.rows[number]["feat"].numpy())


class Safetensors(Peer):
    """One file of named tensors that stays open."""

    name, module, package = "safetensors", "safetensors", "safetensors"

    def write(self, samples: Sequence[np.ndarray]) -> None:
        from safetensors.numpy import save_file

        save_file(
            {str(i): sample.view(np.float16) for i, sample in enumerate(samples)}, self.folder / "all.safetensors"
        )

    def open(self) -> None:
        self.file = safetensors.safe_open(self.folder / "all.safetensors", framework="pt")

    def read(self, number: int, out: np.ndarray) -> None:
        np.copyto(out.view(np.float16), self.file.get_tensor(str(number)).numpy())


class Mosaic(Peer):
    """MDS shards read from a local folder."""

    name, module, package = "mosaicml-streaming", "streaming", "mosaicml-streaming"

    def write(self, samples: Sequence[np.ndarray]) -> None:
        with self.library.MDSWriter(
            out=str(self.folder / "set"), columns={"feat": "bytes"}, size_limit=SHARD_BYTES
        ) as writer:
            for sample in samples:
                writer.write({"feat": sample.tobytes()})

    def open(self) -> None:
        self.rows = self.library.StreamingDataset(local=str(self.folder / "set"), shuffle=False, batch_size=1)

    def read(self, number: int, out: np.ndarray) -> None:
        np.copyto(out, np.frombuffer(self.rows[number]["feat"], np.uint8))


class WebDataset(Peer):
    """A tar file, which is read from the first sample to the last."""

    name, module, package, sequential = "webdataset (sequential)", "webdataset", "webdataset", True

    def write(self, samples: Sequence[np.ndarray]) -> None:
        with self.library.TarWriter(str(self.folder / "all.tar")) as writer:
            for i, sample in enumerate(samples):
                writer.write({"__key__": f"{i:06d}", "feat.bin": sample.tobytes()})

    def open(self) -> None:
        self.rows = self.library.WebDataset(str(self.folder / "all.tar"), shardshuffle=False)
        self.position = iter(self.rows)

    def read(self, number: int, out: np.ndarray) -> None:
        if number == 0:
            self.position = iter(self.rows)
        np.copyto(out, np.frombuffer(next(self.position)["feat.bin"], np.uint8))


class LitData(Peer):
    """Chunks that its optimizer writes, read as a map."""

    name, module, package = "litdata", "litdata", "litdata"

    def write(self, samples: Sequence[np.ndarray]) -> None:
        cache = self.library.streaming.cache.Cache(str(self.folder / "set"), chunk_bytes=SHARD_BYTES)
        for i, sample in enumerate(samples):
            cache[i] = {"feat": sample.tobytes()}
        cache.done()
        cache.merge()

    def open(self) -> None:
        self.rows = self.library.StreamingDataset(str(self.folder / "set"), shuffle=False)

    def read(self, number: int, out: np.ndarray) -> None:
        np.copyto(out, np.frombuffer(self.rows[number]["feat"], np.uint8))


class TorchLoad(Peer):
    """One file per sample."""

    name, module, package = "torch.load", "torch", "torch"
    mapped = False

    def write(self, samples: Sequence[np.ndarray]) -> None:
        for i, sample in enumerate(samples):
            torch.save(torch.from_numpy(sample.view(np.float16).copy()), self.folder / f"{i}.pt")

    def open(self) -> None:
        """Nothing stays open."""

    def read(self, number: int, out: np.ndarray) -> None:
        found = torch.load(self.folder / f"{number}.pt", weights_only=True, mmap=self.mapped)
        np.copyto(out.view(np.float16), found.numpy())


class TorchLoadMapped(TorchLoad):
    """The same, mapped."""

    name = "torch.load (mmap)"
    mapped = True


PEERS: tuple[type[Peer], ...] = (
    Memmap, Safetensors, HfDatasets, HfTorch, TorchLoad, TorchLoadMapped, Mosaic, LitData, WebDataset,
)  # fmt: skip
