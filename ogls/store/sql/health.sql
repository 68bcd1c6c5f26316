-- Health checks of each run: number of failed rounds, first failed round, newest value and limit.
SELECT run, "check", count(*) FILTER (failed) AS failed_rounds, min(round) FILTER (failed) AS first_failed,
       arg_max(value, round) AS newest, arg_max("limit", round) AS newest_limit, arg_max(action, round) AS action
FROM main.health GROUP BY run, "check" ORDER BY run, failed_rounds DESC, "check"
