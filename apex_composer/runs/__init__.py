"""Around a training run: before it (plan, doctor, guard), when it is killed, after it (branch)."""
