"""TensorBoard's event files. tensorboardX imports torch where that is installed, for seconds; no tensor comes by here."""

import sys
import typing

_modules: dict[str, typing.Any] = sys.modules
_hidden = "torch" not in _modules
if _hidden:
    _modules["torch"] = None  # an import of it fails
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2
finally:
    if _hidden:
        del _modules["torch"]

Event: typing.Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]  made at run time
Summary: typing.Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

__all__ = ["Event", "EventsWriter", "Summary"]
