"""What a server needs. No model, and nothing of a client."""

from .aggregation import AGGREGATORS, Aggregator, WeightedMean, make_aggregator, weighted_mean
from .sampling import ClientSampler, TooFewClientsError, ask_sampler, sample_clients, seeded_sampler
from .server import Server
from .state import OpenRound, ServerSettings, ServerState

__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "ClientSampler",
    "OpenRound",
    "Server",
    "ServerSettings",
    "ServerState",
    "TooFewClientsError",
    "WeightedMean",
    "ask_sampler",
    "make_aggregator",
    "sample_clients",
    "seeded_sampler",
    "weighted_mean",
]
