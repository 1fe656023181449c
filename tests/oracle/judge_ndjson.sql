-- raw(topic, partition, "offset", append_us, payload) → judged: every record with what it
-- says, or the reason why it says nothing.
--
-- syntax_reason(payload) is Python's json module (oracle.py): DuckDB's JSON would let NaN,
-- repeated keys and trailing commas pass. From there on all is SQL.

CREATE TABLE fields AS
WITH screened AS (
    SELECT *, syntax_reason(payload) AS syntax FROM raw
), objects AS (
    SELECT *, CASE WHEN syntax IS NULL THEN decode(payload)::JSON END AS record FROM screened
)
SELECT
    * EXCLUDE (record),
    json_type(record, '$.event_time') AS time_type,
    json_extract(record, '$.event_time')::VARCHAR AS time_token,
    json_extract_string(record, '$.event_time') AS time_text,
    json_type(record, '$.user_id') AS user_type,
    json_extract_string(record, '$.user_id') AS user_id,
    json_type(record, '$.page_url') AS page_type,
    json_extract_string(record, '$.page_url') AS page_url,
    json_type(record, '$.event_type') AS type_type,
    json_extract_string(record, '$.event_type') AS event_type,
    json_type(record, '$.event_id') AS id_type,
    json_extract_string(record, '$.event_id') AS event_id
FROM objects;

-- RFC 3339, section 5.6. Digits past µs are cut; second 60 is the next second, and stands
-- only where UTC is 23:59.
CREATE TABLE times AS
WITH parts AS (
    SELECT
        topic, partition, "offset", time_type, time_token,
        regexp_extract(
            CASE WHEN time_type = 'VARCHAR' THEN time_text END,
            '^(\d{4}-\d\d-\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))$',
            ['day', 'hour', 'minute', 'second', 'fraction', 'sign', 'off_hour', 'off_minute']
        ) AS p
    FROM fields
), numbers AS (
    SELECT
        topic, partition, "offset", time_type, time_token,
        epoch_us(try_cast(p.day || ' 00:00:00' AS TIMESTAMP)) AS day_us,
        try_cast(p.hour AS BIGINT) AS hour,
        try_cast(p.minute AS BIGINT) AS minute,
        try_cast(p.second AS BIGINT) AS second,
        rpad(p.fraction, 6, '0')[:6]::BIGINT AS fraction_us,
        CASE p.sign WHEN '-' THEN -1 ELSE 1 END AS sign,
        coalesce(try_cast(p.off_hour AS BIGINT), 0) AS off_hour,
        coalesce(try_cast(p.off_minute AS BIGINT), 0) AS off_minute
    FROM parts
), minutes AS (
    SELECT
        *,
        day_us + ((hour - sign * off_hour) * 60 + minute - sign * off_minute) * 60_000_000
            AS minute_us
    FROM numbers
)
SELECT
    topic, partition, "offset",
    CASE
        WHEN time_type IS NULL OR time_type = 'NULL' THEN 'missing_field'
        WHEN time_type = 'VARCHAR' THEN CASE
            WHEN minute_us IS NULL OR hour > 23 OR minute > 59 OR second > 60
                OR off_hour > 23 OR off_minute > 59
                OR (second = 60 AND (minute_us + 62_167_219_200_000_000) % 86_400_000_000
                    <> 86_340_000_000)
                THEN 'bad_time'
        END
        -- Nine to eleven digits: as milliseconds 1970 to 1973, as seconds any time since.
        WHEN regexp_full_match(time_token, '[1-9][0-9]{8,10}') THEN 'epoch_seconds'
        -- Python takes longer integers for infinite ones.
        WHEN regexp_full_match(time_token, '-?[0-9]+') AND length(ltrim(time_token, '-')) > 4300
            THEN 'bad_number'
        WHEN regexp_full_match(time_token, '-?[0-9]+') THEN NULL
        WHEN time_type = 'DOUBLE' AND NOT isfinite(coalesce(try_cast(time_token AS DOUBLE), 'inf'))
            THEN 'bad_number'
        ELSE 'wrong_type'
    END AS flaw,
    CASE
        WHEN time_type = 'VARCHAR' THEN minute_us::HUGEINT + second * 1_000_000 + fraction_us
        WHEN regexp_full_match(time_token, '-?[0-9]{1,20}')
            THEN time_token::HUGEINT * 1000
        WHEN regexp_full_match(time_token, '-?[0-9]+') THEN 999_999_999_999_999_999_999::HUGEINT
    END AS event_us
FROM minutes;

CREATE MACRO text_flaw(kind, value, required) AS CASE
    WHEN kind IS NULL OR kind = 'NULL' OR (kind = 'VARCHAR' AND value = '')
        THEN CASE WHEN required THEN 'missing_field' END
    WHEN kind <> 'VARCHAR' THEN 'wrong_type'
    WHEN contains(value, chr(0)) THEN 'nul_character'
END;

CREATE TABLE judged AS
SELECT
    topic, partition, "offset", append_us, payload,
    coalesce(
        syntax,
        times.flaw,
        CASE
            WHEN event_us NOT BETWEEN -62_135_596_800_000_000 AND 253_402_300_799_999_999
                THEN 'time_out_of_range'
        END,
        text_flaw(user_type, user_id, true),
        text_flaw(page_type, page_url, true),
        text_flaw(type_type, event_type, true),
        CASE
            WHEN event_type NOT IN ('page_view', 'click', 'session_start', 'session_end')
                THEN 'unknown_value'
        END,
        text_flaw(id_type, event_id, false)
    ) AS reason,
    CASE WHEN reason IS NULL THEN event_us::BIGINT END AS event_us,
    CASE WHEN reason IS NULL THEN user_id END AS user_id,
    CASE WHEN reason IS NULL THEN page_url END AS page_url,
    CASE WHEN reason IS NULL THEN event_type END AS event_type,
    CASE WHEN reason IS NULL THEN nullif(event_id, '') END AS event_id
FROM fields JOIN times USING (topic, partition, "offset");
