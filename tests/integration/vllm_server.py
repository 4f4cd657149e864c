"""vLLM's OpenAI server, whose processes are forked from it: on a CPU it would spawn them, and import vLLM three times."""

import multiprocessing
import runpy

if __name__ == "__main__":
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context("fork" if method == "spawn" else method)  # type: ignore[assignment]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
