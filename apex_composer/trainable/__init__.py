"""Training of some rows only: copies, optimizer, count. Imports sharding and what is below it."""
