"""From tokens to shards on disk. Imports all rooms before it."""
