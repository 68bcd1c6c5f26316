-- Failed rollouts and benchmark completions of problems with accuracy below 0.5 in that round, and of at least 0.5 in the next round that tried them. Training rollouts come before benchmarks, rollouts with a target (kl, in nats per token) before those without, early rounds first.
WITH tried AS (
    SELECT run, 'train' AS split, problem_id, round, sample, verdict, outcome = 'correct' AS correct,
           outcome = 'failed' AS failed
    FROM verdicts
    UNION ALL
    SELECT run, benchmark, problem_id, round, sample, verdict, verdict = 'correct',
           verdict IN ('incorrect', 'no_answer', 'truncated')
    FROM scores WHERE NOT greedy
),
by_round AS (
    SELECT run, split, problem_id, round, avg(correct::INT) AS accuracy FROM tried GROUP BY ALL
),
followed AS (
    SELECT *, lead(accuracy) OVER later AS next_accuracy, lead(round) OVER later AS next_round
    FROM by_round WINDOW later AS (PARTITION BY run, split, problem_id ORDER BY round)
),
fixed AS (
    SELECT * FROM (FROM followed WHERE accuracy < 0.5 AND next_accuracy >= 0.5)
    JOIN (FROM tried WHERE failed) USING (run, split, problem_id, round)
)
SELECT run, split, round, problem_id, sample, verdict, accuracy, next_round, next_accuracy, kl
FROM fixed LEFT JOIN (SELECT run, 'train' AS split, round, problem_id, sample, kl FROM steered)
     USING (run, split, round, problem_id, sample)
ORDER BY split <> 'train', kl IS NULL, round, next_accuracy - accuracy DESC, run, split, problem_id, sample LIMIT 50
