"""From a dump to exact per-head quantities: `run.analyze` is the way in, `engine` explains how they are computed."""
