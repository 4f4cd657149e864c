"""The embedded engine. From outside, import `sampler`; the rest runs in its worker process."""
