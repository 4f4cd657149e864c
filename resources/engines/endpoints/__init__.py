"""vLLM servers that run already. From outside, import `sampler`; the rest runs in its worker process."""
