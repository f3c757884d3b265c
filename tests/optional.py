"""What some tests need and need not be installed: without it they are skipped and say so.

Hooks of pytest, for conftest.py. What is not named here fails where it is missing.
"""

import importlib.util

import pytest

MODULES = {
    *("PIL", "matplotlib", "scipy", "sklearn", "tqdm", "yaml"),
    *("hypothesis", "ot", "pybind11"),
    *("accelerate", "peft", "safetensors", "timm", "tokenizers", "torchvision", "transformers"),
    *("pycocotools", "segmentation_models_pytorch", "tensorboard", "torchmetrics"),
    *("onnx", "onnxruntime", "onnxscript"),
}


def missing(error: BaseException | None) -> str | None:
    """The one of MODULES that is not installed, if the error comes of that."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            name = (error.name or "").partition(".")[0]
            if name in MODULES and not _installed(name):
                return name
        error = error.__cause__ or error.__context__
    return None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _skip_what_misses_one(
    report: pytest.CollectReport | pytest.TestReport, call: pytest.CallInfo, path: object
) -> None:
    name = missing(call.excinfo.value) if call.excinfo is not None else None
    if report.outcome == "failed" and name is not None:
        report.outcome = "skipped"
        report.longrepr = (str(path), 0, f"Skipped: needs {name}, which is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """A file that cannot be imported."""
    report = yield
    _skip_what_misses_one(report, report.call, collector.path)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A test, or a fixture of it, that imports something as it runs."""
    report = yield
    _skip_what_misses_one(report, call, item.path)
    return report
