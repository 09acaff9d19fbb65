"""Functions that must not run in the tests' own process."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def elsewhere(function: Callable, *arguments: object) -> object:
    """What a function of a test's module returns in a process of its own.

    For what calls ``torch.set_num_threads``: torch 2.13's ``linalg.inv`` is wrong afterwards.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        return processes.submit(function, *arguments).result()
