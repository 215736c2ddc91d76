"""The local servers: Postgres, Valkey and S3 from wheels, configured and supervised by us.

`python -m tunery.embedded up` is the supervisor behind `tunery up`. The command line starts it as a process
and never imports this package, so `tunery --help` stays fast and a client needs no database driver.
"""
