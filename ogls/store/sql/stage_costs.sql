-- Cost of each stage over a run: seconds, share of the time, rows, and tokens per second if the stage counts tokens.
SELECT run, stage, count(*) AS times, sum(seconds) AS seconds,
       sum(seconds) / sum(sum(seconds)) OVER (PARTITION BY run) AS share, sum(rows)::BIGINT AS rows,
       sum((metrics->>'tokens')::DOUBLE)::BIGINT AS tokens,
       sum((metrics->>'tokens')::DOUBLE) / nullif(sum(seconds) FILTER ((metrics->>'tokens') IS NOT NULL), 0)
           AS tokens_a_second
FROM stages GROUP BY run, stage ORDER BY run, seconds DESC
