"""Small models are fastest on one thread, and transformers need not tell what it draws anew."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import transformers  # not above: where it is missing, the tests are skipped and say so

    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
