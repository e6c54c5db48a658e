"""Language models, reward models and critics: loaded, put under adapters, sharded, run forward, saved."""
