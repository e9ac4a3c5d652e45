"""Streams of frames: order, overlap, memory and refusals, by a stand-in for the GPU's streams."""

import itertools

import numpy as np
import pytest
import torch
from models import CONFIGS, build
from recording import Recording

import shelfkern
from shelfkern.engine.frames import FrameStream, as_frame, batches

CPU = torch.device("cpu")


def frame(value, size=(4, 6)):
    return torch.full((*size, 3), value, dtype=torch.uint8)


class Network:
    """Gives the first channel as labels, and says in which stream it ran and what had ended by then."""

    def __init__(self, runtime):
        self.runtime, self.begun = runtime, []

    def __call__(self, images):
        self.begun.append(frozenset(self.runtime.ended[self.runtime.stream]))
        self.runtime.work(("segmented", len(self.begun) - 1))
        return images[..., 0].clone()


def run(frames, batch=1, depth=2):
    runtime = Recording()
    network = Network(runtime)
    stream = FrameStream(network, CPU, runtime, depth)
    return runtime, network, stream.run(batches(frames, batch))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_labels_come_in_order(batch):
    frames = [frame(value) for value in range(7)]
    *_, labels = run(frames, batch)
    found = list(labels)
    assert [int(one[0, 0]) for one in found] == list(range(7))
    assert all(one.shape == (4, 6) and one.dtype is torch.uint8 for one in found)
    # Each is its own: the memory that it came through is used again.
    assert len({one.data_ptr() for one in found}) == 7
    assert [int(one[0, 0]) for one in found] == list(range(7))


def test_sizes_may_change_and_batches_do_not_mix_them():
    sizes = [(4, 6)] * 3 + [(6, 4)] * 2 + [(4, 6)]
    frames = [frame(value, size) for value, size in enumerate(sizes)]
    assert [len(some) for some in batches(frames, 2)] == [2, 1, 2, 1]
    *_, labels = run(frames, 2)
    assert [(int(one[0, 0]), one.shape) for one in labels] == list(enumerate(sizes))


def test_two_batches_are_under_way_and_no_more():
    drawn = []

    def source():
        for value in range(6):
            drawn.append(value)
            yield frame(value)

    _, network, labels = run(source())
    # groupby looks one frame ahead, to see whether its size is the same.
    next(labels)
    assert len(network.begun) == 2 and len(drawn) == 3
    next(labels)
    assert len(network.begun) == 3 and len(drawn) == 4


def test_a_batch_is_segmented_after_its_upload_and_downloaded_after_that():
    runtime, _, labels = run([frame(value) for value in range(5)])
    list(labels)
    streams = {entry[1] for entry in runtime.log} - {"host"}
    assert len(streams) == 3
    upload, download = sorted(streams - {"main"})
    # main waits for an event of the upload stream before each batch.
    uploads = [entry[2] for entry in runtime.log if entry[:2] == ("mark", upload)]
    waited = [entry[2] for entry in runtime.log if entry[:2] == ("wait", "main")]
    assert waited == uploads and len(uploads) == 5
    # The host waits for the download of each before it reads the labels.
    downloads = [entry[2] for entry in runtime.log if entry[:2] == ("mark", download)]
    assert [entry[2] for entry in runtime.log if entry[0] == "synchronize"] == downloads
    assert {("segmented", index) for index in range(5)} <= runtime.ended["host"]
    # Labels made in one stream and read in another are kept until they have been read.
    assert [stream for stream, _ in runtime.kept] == [download] * 5


def test_memory_is_not_overwritten_before_it_was_read():
    runtime, _, labels = run([frame(value) for value in range(5)])
    list(labels)
    (upload,) = {entry[1] for entry in runtime.log if entry[0] == "wait"} - {"main", *_downloads(runtime)}
    # The third batch takes the first one's memory: its upload waits until that was segmented.
    assert {("segmented", index) for index in range(3)} <= runtime.ended[upload]


def test_new_memory_is_not_written_before_its_last_user_has_ended():
    # The allocator gives out memory whose work on the current stream is launched, but may not have ended.
    runtime = Recording()
    runtime.work("its last user")
    list(FrameStream(Network(runtime), CPU, runtime, 2).run(batches([frame(0)], 1)))
    (upload,) = {entry[1] for entry in runtime.log if entry[0] == "wait"} - {"main", *_downloads(runtime)}
    assert "its last user" in runtime.ended[upload]


def _downloads(runtime):
    return {stream for stream, _ in runtime.kept}


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ("image.png", TypeError, "a frame is str, it must be a numpy array or a tensor"),
        (np.zeros((4, 6, 4), np.uint8), ValueError, r"a frame is torch.uint8 \(4, 6, 4\), it must be uint8"),
        (np.zeros((4, 6, 3), np.float32), ValueError, r"a frame is torch.float32 \(4, 6, 3\)"),
        (torch.zeros(4, 6, 3, dtype=torch.uint8, device="meta"), ValueError, "a frame is on meta"),
    ],
)
def test_bad_frames_are_refused(bad, error, message):
    with pytest.raises(error, match=message):
        as_frame(bad)


def test_arrays_with_rows_that_run_backwards():
    array = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    assert torch.equal(as_frame(array[::-1]), torch.from_numpy(array.copy()).flip(0))


@torch.no_grad()
def test_frames_on_a_cpu():
    fast = shelfkern.accelerate(build(CONFIGS["attention"]))
    raw = torch.randint(0, 256, (5, 40, 48, 3), dtype=torch.uint8)
    found = fast.predict_frames(itertools.chain(raw.numpy(), raw[:, :33]), 2)
    expected = [*fast.predict(raw), *fast.predict(raw[:, :33])]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="batch is 0, it must be at least 1"):
        fast.predict_frames(raw, 0)
