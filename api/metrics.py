"""What the api counts. No label names a tenant or a job: each value would be a series for ever."""

from prometheus_client import Counter, Histogram

HTTP_DURATION = Histogram(
    "tunery_http_request_duration_seconds",
    "Time to answer a request.",
    ["route", "method", "status"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120),
)
UPLOADED_BYTES = Counter("tunery_uploaded_bytes_total", "Bytes of files accepted.")
