"""Opening an ONNX folder with Optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def require_onnxruntime() -> None:
    """Refuse early where export and ONNX Runtime can't work.

    The symbols themselves are imported: with transformers 5, `import optimum.exporters.onnx` succeeds and its
    `main_export` doesn't.

    Raises:
        ImportError: the `onnxruntime` extra isn't installed; says how.
    """
    try:
        from onnxruntime import SessionOptions  # noqa: F401
        from optimum.exporters.onnx import main_export  # noqa: F401
        from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "this needs ONNX Runtime: pip install 'optimum-comp[onnxruntime]' (in an environment with transformers "
            f"below 4.58). {error}"
        ) from error


def load_onnx(path: str | Path, threads: int | None = None, **kwargs: Any) -> Any:
    """`ORTModelForCausalLM` on the CPU.

    Args:
        path: an ONNX folder.
        threads: threads inside an operator; `None` leaves ONNX Runtime's default.
        kwargs: passed on to `from_pretrained`.

    Raises:
        ImportError: the `onnxruntime` extra isn't installed; says how.
    """
    require_onnxruntime()
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForCausalLM

    options = SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    return ORTModelForCausalLM.from_pretrained(
        path, provider="CPUExecutionProvider", session_options=options, **kwargs
    )
