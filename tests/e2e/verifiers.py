"""Reward functions named by import path in the runs of these tests; worker processes import them."""

import os
import time
import zlib


def coin(data_source, solution_str, ground_truth, extra_info=None):
    """Half of all texts are right, always the same half."""
    return float(zlib.crc32(solution_str.encode()) % 2)


def broken(data_source, solution_str, ground_truth, extra_info=None):
    """Fails in the way that its row's ground truth names."""
    if ground_truth == "raise":
        raise RuntimeError("no verdict from me")
    if ground_truth == "hang":
        time.sleep(1000)
    if ground_truth == "die":
        os._exit(3)
    if ground_truth == "nan":
        return float("nan")
    return coin(data_source, solution_str, ground_truth)
