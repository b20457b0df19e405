"""Ask a served model: verify its enclave, seal the records, check the answers. Needs no torch."""

from caltrain.client.served.aio import AsyncServedModel
from caltrain.client.served.handshake import Expectations
from caltrain.client.served.session import Prediction
from caltrain.client.served.sync import ServedModel

__all__ = ["AsyncServedModel", "Expectations", "Prediction", "ServedModel"]
