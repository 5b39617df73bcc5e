"""How an LLM ends: by closing it, when nobody has it any more, and with the program."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading

import pytest

from treespec_jax.errors import UserError
from treespec_jax.llm import LLM

pytestmark = pytest.mark.slow


def test_closing_ends_calls_and_the_thread(scripted_draft):
    """Who is under way gets an error; so does who comes later."""
    llm = LLM(scripted_draft, speculative=None, max_batch=1, max_len=16, page_size=16)
    thread = llm._worker._thread
    with llm, llm.exclusive():
        stream = llm.stream([5])
        closing = threading.Thread(target=llm.close)
        closing.start()
    closing.join()
    thread.join()
    with pytest.raises(UserError, match="the LLM was closed; make a new one"):
        next(stream)
    for use in (llm.reset, lambda: llm.generate([[5]]), lambda: llm.stream([5])):
        with pytest.raises(UserError, match="the LLM was closed"):
            use()
    llm.close()


def test_the_thread_ends_with_the_llm(scripted_draft):
    llm = LLM(scripted_draft, speculative=None, max_batch=1, max_len=16, page_size=16)
    thread = llm._worker._thread
    assert thread.is_alive()
    del llm
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


SCRIPT = """
    import threading
    from tests.engine.scripted import scripted
    from treespec_jax import LLM, SamplingParams

    llm = LLM(scripted(None, {}), speculative=None, max_batch=2, max_len=96)
    params = SamplingParams(max_tokens=90, ignore_eos=True)
    stream = llm.stream([5], params)
    next(stream, None)
    other = threading.Thread(target=llm.generate, args=([[6]], params), daemon=True)
    other.start()
    print(len(llm.generate([[7]], params)[0].token_ids))
"""


def test_a_program_ends_with_calls_under_way():
    """With a stream that nobody closed, and a daemon thread in the middle of a call."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "90\n", "")
