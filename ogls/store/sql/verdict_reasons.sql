-- Number and share of each verdict, by run and round.
SELECT run, round, verdict, any_value(outcome) AS outcome, count(*) AS rollouts,
       count(*) / sum(count(*)) OVER (PARTITION BY run, round) AS share
FROM verdicts GROUP BY run, round, verdict ORDER BY run, round, rollouts DESC, verdict
