"""What has to hold on an accelerator: ``python -m pytest tests/device``, on a stand-in, or on that which there is."""
