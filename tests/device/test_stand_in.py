"""The stand-in for an accelerator refuses what one refuses: else the other tests of this folder would show nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.support.device_models import NAME

pytestmark = pytest.mark.skipif(NAME != "standin", reason="a real accelerator")


@pytest.mark.parametrize("operation", [torch.add, torch.mm, F.linear, torch.maximum, lambda x, y: torch.cat([x, y])])
def test_tensors_of_two_devices_do_not_meet(operation, device):
    x = torch.randn(4, 4)
    assert operation(x.to(device), x.to(device)).device == device
    for pair in ((x.to(device), x), (x, x.to(device))):
        with pytest.raises(RuntimeError, match="same device"):
            operation(*pair)


def test_nothing_is_written_to_the_cpu_or_looked_up_in_it(device):
    x = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="same device"):
        torch.tensor(1.0).add_(x.to(device).sum())
    with pytest.raises(RuntimeError, match="same device"):
        x[torch.tensor([0, 2]).to(device)]
    with pytest.raises(RuntimeError, match="same device"):
        F.conv2d(x.to(device)[None, None], torch.randn(1, 1, 2, 2))
    assert torch.equal((x.to(device) * torch.tensor(2.0)).cpu(), x * 2)


def test_views_share_memory_and_gradients_are_torchs(device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    copy = x.detach().clone()
    copy.T[1:3].reshape(-1)[0] = 7.0
    copy[:, 3].view(4).fill_(5.0)
    expected = x.detach().cpu().clone()
    expected[:, 3] = 5.0
    assert torch.equal(copy.cpu(), expected)
    (x.T @ x).tanh().sum().backward()
    other = x.detach().cpu().requires_grad_()
    (other.T @ other).tanh().sum().backward()
    torch.testing.assert_close(x.grad.cpu(), other.grad)
