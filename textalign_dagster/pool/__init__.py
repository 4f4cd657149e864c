"""The pure core of the datapool: conditioning, quantiles, balanced draw, exemplars.

No dagster, torch or vllm; any module may be imported from outside.
"""
