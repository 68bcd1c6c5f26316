-- Unbiased pass@k (arXiv 2107.03374, eq. 1) by benchmark and round, for k = 1 .. samples.
WITH problems AS (
    SELECT run, round, benchmark, problem_id, count(*) AS n, count(*) FILTER (verdict = 'correct') AS c
    FROM scores WHERE NOT greedy GROUP BY ALL
),
ks AS (SELECT *, unnest(generate_series(1, n)) AS k FROM problems)
SELECT run, round, benchmark, k,
       avg(CASE WHEN n - c < k THEN 1.0
                ELSE 1 - exp(lgamma(n - c + 1) - lgamma(n - c - k + 1) - lgamma(n + 1) + lgamma(n - k + 1)) END) AS pass_at_k
FROM ks GROUP BY ALL ORDER BY run, benchmark, round, k
