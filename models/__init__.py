"""Networks and numerics. May use the types of `data`; knows no configuration, no DVC, no Prefect."""
