-- Wall time and rows of every finished stage, in the order of completion.
SELECT run, round, stage, round(seconds, 2) AS seconds, rows, written FROM stages ORDER BY written
