-- raw(topic, partition, "offset", append_us, payload) → judged: every line of a common or
-- combined log, also behind a virtual host, or the reason why it is none. Lines are UTF-8 here;
-- others make this fail.

CREATE MACRO is_address(word) AS
    regexp_full_match(word, '\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}')
    OR (word LIKE '%:%:%' AND regexp_full_match(split_part(word, '%', 1), '[0-9a-fA-F:.]+'));

CREATE TABLE judged AS
WITH lines AS (
    SELECT
        *,
        regexp_extract(
            decode(payload),
            '^(\S+) (\S+) (.+?) \[(\d\d)/([A-Z][a-z]{2})/(\d{4}):(\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d)\] '
            '"((?:[^"\\]|\\.)*)" (?:\d{3}|-) (?:\d+|-)(?: .*)?$',
            ['word_1', 'word_2', 'others', 'day', 'month', 'year', 'hour', 'minute', 'second',
             'sign', 'off_hour', 'off_minute', 'request']
        ) AS p
    FROM raw
), numbers AS (
    SELECT
        * EXCLUDE (p),
        -- %h %l %u, or %v:%p %h %l %u: what a line is shows in its second word.
        CASE
            WHEN p.word_2 = '-' THEN p.word_1
            WHEN regexp_full_match(p.word_1, '([^:\[\]]+|\[[^\[\]]+\]):\d{1,5}')
                AND CASE
                    WHEN is_address(p.word_2) THEN regexp_matches(p.others, '^\S+ .')
                    ELSE p.others LIKE '- _%'
                END THEN p.word_2
            WHEN NOT is_address(p.word_2) THEN p.word_1
        END AS user_id,
        epoch_us(try_cast(
            p.year || '-' || list_position(
                ['Jan', 'Feb', 'Mar', 'Apr', 'May', 'Jun', 'Jul', 'Aug', 'Sep', 'Oct', 'Nov', 'Dec'],
                p.month
            ) || '-' || p.day || ' ' || p.hour || ':' || p.minute || ':' || p.second AS TIMESTAMP
        )) - CASE p.sign WHEN '-' THEN -1 ELSE 1 END
            * (try_cast(p.off_hour AS BIGINT) * 60 + try_cast(p.off_minute AS BIGINT)) * 60_000_000
            AS event_us,
        -- A request is METHOD target, mostly with a protocol behind it.
        regexp_extract(p.request, '^\S+ +(.*?)(?: +HTTP/\S*)?$', 1) AS page_url
    FROM lines
)
SELECT
    topic, partition, "offset", append_us, payload,
    CASE
        WHEN trim(decode(payload), E' \t\r\n') = '' THEN 'empty_payload'
        WHEN event_us IS NULL OR user_id IS NULL THEN 'not_access_log'
        WHEN page_url = '' THEN 'no_target'
    END AS reason,
    CASE WHEN reason IS NULL THEN event_us END AS event_us,
    CASE WHEN reason IS NULL THEN user_id END AS user_id,
    CASE WHEN reason IS NULL THEN page_url END AS page_url,
    CASE WHEN reason IS NULL THEN 'page_view' END AS event_type,
    NULL::VARCHAR AS event_id
FROM numbers;
