"""Dead letters: how they are read from the broker, filtered, replayed and shown."""
