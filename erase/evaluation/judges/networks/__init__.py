"""Networks that judges look through: others trained them, and their weights come from files or the hub."""
