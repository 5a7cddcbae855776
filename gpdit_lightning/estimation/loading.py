"""Host memory and shared memory of the processes that load batches."""

from gpdit_lightning.estimation.requirements import RunSettings, pass_shape

PREFETCHED = 2  # batches per process that are loaded ahead (torch's default)
# A semaphore of Python takes a page of /dev/shm. A queue has three, an event five.
PAGE, QUEUE_SEMAPHORES, EVENT_SEMAPHORES = 4096, 3, 5
LOADERS = 2  # of training and of validation


def batch_bytes(run: RunSettings) -> int:
    """Return the bytes of the largest batch of a GPU: its latents and noise in float32."""
    sizes = []
    for source in run.sources:
        for micro_batch in run.micro_batch_shapes(source):
            shape = pass_shape(run, source, micro_batch, micro_batch.samples // run.gpus, 0)
            values = run.backbone.latent_channels * shape.height * shape.width
            sizes.append(4 * values * shape.clips * (shape.frames + shape.draws * len(shape.noisy)))
    return max(sizes)


def loaded_bytes(run: RunSettings, workers: int) -> int:
    """Return the bytes of the batches that the loader processes of a GPU hold, in host memory."""
    return batch_bytes(run) * PREFETCHED * workers


def shared_memory_bytes(workers: int) -> int:
    """Return the bytes of /dev/shm that the loader processes of a GPU need: semaphores only (`workers.py`)."""
    semaphores = QUEUE_SEMAPHORES * (workers + 1) + EVENT_SEMAPHORES
    return LOADERS * semaphores * PAGE if workers else 0
