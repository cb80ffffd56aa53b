-- One booking, whose document storage/postgres/admission.py writes: its kind, and what the function that books it takes.
-- It waits for a lock for as long as the transaction says: the functions called here have no bound of their own.
CREATE FUNCTION engine_book_v1(b jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_kind text := b ->> 'kind';
BEGIN
    IF v_kind = 'settle' THEN
        RETURN engine_settle_v7(b -> 'command', b -> 'ledger');
    ELSIF v_kind = 'admit_as_assumed' THEN
        IF abs(extract(epoch FROM clock_timestamp() - (b ->> 'at')::timestamptz)) <= (b ->> 'tolerance')::double precision THEN
            -- An argument is worked out before its function is called: what was assumed is taken once the decision is booked.
            RETURN engine_as_assumed_v3(engine_admit_v7(b -> 'command'), (b #>> '{command,tenant_id}')::uuid,
                (b #>> '{command,run_id}')::uuid, b -> 'buckets');
        END IF;
        RETURN '{"status": "not_as_assumed"}';
    ELSIF v_kind = 'admit' THEN
        RETURN engine_admit_v7(b -> 'command');
    ELSIF v_kind = 'begin' THEN
        RETURN engine_begin_v5((b ->> 'tenant_id')::uuid, (b ->> 'run_id')::uuid, (b ->> 'step_index')::integer,
            (b ->> 'attempt')::integer, (b ->> 'grant_id')::uuid, (b ->> 'fencing_token')::bigint, b ->> 'actor');
    ELSIF v_kind = 'prepare' THEN
        RETURN engine_prepare_v3((b ->> 'tenant_id')::uuid, (b ->> 'run_id')::uuid, b -> 'buckets')
            || jsonb_build_object('at', clock_timestamp());
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = format('there is no booking of the kind %s', v_kind);
END
$$;

-- The same, for who may wait: nobody is behind it, or the transaction is a caller's.
CREATE FUNCTION engine_book_patiently_v1(b jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
BEGIN
    RETURN engine_book_v1(b);
END
$$;

-- Several bookings in one message, each a transaction of its own, and answers when all are on disk: of each what it answers,
-- or of one that failed, and left nothing, the error's code as a JSON string. Both are JSON text sequences (RFC 7464), with a
-- record separator before each text. A document is read where it is booked, so that a bad one is no other's failure.
-- Each commits without waiting for the disk, so that its rows are free for the next; the last transaction, which only writes
-- to the log, waits for them all. Whoever waits for somebody's lock for longer than `p_patience` has failed: it holds up the
-- rest. After one of the kind there may be more, so the others have but a moment. When all have taken five seconds, those
-- that are left are not made any more: who waits for them is told soon.
-- A procedure that sets something for itself may not commit, so every name in here says its schema.
CREATE PROCEDURE engine_book_round_v1(
    p_bookings pg_catalog.text, p_patience pg_catalog.text, INOUT p_answers pg_catalog.text
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    v_texts    pg_catalog.text[] := pg_catalog.string_to_array(p_bookings, E'\x1e');
    v_patience pg_catalog.text := p_patience;
    v_until    pg_catalog.timestamptz := pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => 5);
    v_answer   pg_catalog.jsonb;
    v_set      pg_catalog.text;
BEGIN
    p_answers := '';
    FOR v_each IN 2 .. pg_catalog.cardinality(v_texts) LOOP
        IF pg_catalog.clock_timestamp() OPERATOR(pg_catalog.<) v_until THEN
            v_set := pg_catalog.set_config('lock_timeout', v_patience, true);
            v_set := pg_catalog.set_config('synchronous_commit', 'off', true);
            BEGIN
                v_answer := public.engine_book_v1(v_texts[v_each]::pg_catalog.jsonb);
            EXCEPTION WHEN OTHERS OR query_canceled THEN
                v_answer := pg_catalog.to_jsonb(SQLSTATE);
                IF SQLSTATE OPERATOR(pg_catalog.=) '55P03' THEN
                    v_patience := '10ms';
                END IF;
            END;
            COMMIT;
        ELSE
            v_answer := '"57014"';
        END IF;
        p_answers := pg_catalog.concat(p_answers, E'\x1e', v_answer);
    END LOOP;
    v_set := pg_catalog.pg_logical_emit_message(true, 'plm', '');
END
$$;
