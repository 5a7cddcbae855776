"""`python -m benchmarks.gpu_check [--out FILE.json]`: everything that only a GPU can show, within 9 minutes.

The parts are run in this order, that of their importance:

- attention: each backend against a dense float64 reference, forward and backward, with its kernel and its times;
- steps: training steps of GPDiT-H and -B by `fit`, compiled and not, with MFU, and peak memory beside the estimate;
- generation: frames per second of H at 192x320 with guidance, by the rollout with a cache;
- offload: training by `fit` under ZeRO with the optimizer in host memory;
- float8: steps with float8 products beside bf16, with the difference of their losses;
- waits: the times that the host waits for the GPU in an optimizer step of `fit`.

Each part runs in a process of its own, so that an error of the GPU ends no other part. A part has a share of the time
that is left; measurements for which no time is left are listed as not run. The report is written after each
measurement, as JSON and as Markdown.

Exit status: 0 if nothing failed, 1 if a measurement failed, 2 for invalid options, 3 without a GPU.
"""
