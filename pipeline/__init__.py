"""The stages: one thin script each, the only floor that knows paths, parameters, MLflow and the runners."""
