-- Removes what answered the commands of runs that ended at least p_keep seconds ago: at most about p_limit records of at most
-- p_limit runs, and begins no run after a second. Whoever calls it calls again, in the next transaction, while there is more.
-- It locks no run and waits for nobody: an ended run never changes, so an admission that finds no record of it is refused by
-- the run's state, and nothing is written that could be missed. Where somebody else expires those of the tenant just now, it
-- leaves them to that one.
-- A row of `idempotency_expiries` says up to which run, in the order in which they ended, the records are gone.
-- Admissions are found by the primary key, as their ids begin with that of their run: 'g' comes behind all that goes on from
-- it, wherever digits come before letters. In a collation of another kind records would stay, but no other would go. The
-- record of the run's own creation is found by the key that the run keeps.
-- Answers {"records", "more"}.
CREATE FUNCTION engine_expire_records_v1(p_tenant uuid, p_keep double precision, p_limit integer) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_longest CONSTANT interval := '1 second';
    v_tenant  uuid := engine_enter_v2(p_tenant);
    v_begun   timestamptz := clock_timestamp();
    v_ended   timestamptz := '-infinity';
    v_run_id  uuid := '00000000-0000-0000-0000-000000000000';
    v_run     record;
    v_before  timestamptz;
    v_count   bigint;
    v_looked  bigint := 0;
    v_records bigint := 0;
    v_more    boolean := false;
BEGIN
    IF p_keep IS NULL OR NOT p_keep >= 86400 OR p_limit IS NULL OR p_limit < 1 THEN
        RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = format(
            'records are kept for a day at least, not for %s s, and go one at a time at least, not %s', p_keep, p_limit);
    END IF;
    IF NOT pg_try_advisory_xact_lock(hashtextextended('idempotency/' || v_tenant, 0)) THEN
        RETURN '{"records": 0, "more": false}';
    END IF;
    v_before := v_begun - make_interval(secs => p_keep);
    SELECT finished_at, run_id INTO v_run FROM idempotency_expiries WHERE tenant_id = v_tenant;
    IF FOUND THEN
        v_ended := v_run.finished_at;
        v_run_id := v_run.run_id;
    END IF;

    FOR v_run IN SELECT finished_at, run_id, idempotency_key FROM run_states
            WHERE tenant_id = v_tenant AND finished_at <= v_before AND (finished_at, run_id) > (v_ended, v_run_id)
              AND state IN ('succeeded', 'failed', 'cancelled')
            ORDER BY finished_at, run_id LIMIT p_limit LOOP
        DELETE FROM idempotency_records WHERE tenant_id = v_tenant AND operation = 'admit' AND command_id = ANY (ARRAY(
            SELECT i.command_id FROM idempotency_records AS i
            WHERE i.tenant_id = v_tenant AND i.operation = 'admit' AND i.command_id > v_run.run_id::text
              AND i.command_id < v_run.run_id || 'g' AND starts_with(i.command_id, v_run.run_id || '/')
            ORDER BY i.command_id LIMIT p_limit - v_records));
        GET DIAGNOSTICS v_count = ROW_COUNT;
        v_records := v_records + v_count;
        v_more := v_records >= p_limit;  -- of this run too, perhaps
        EXIT WHEN v_more;
        IF v_run.idempotency_key IS NOT NULL THEN
            DELETE FROM idempotency_records WHERE tenant_id = v_tenant AND operation = 'runs.create'
                AND command_id = v_run.idempotency_key AND result ->> 'run_id' = v_run.run_id::text;
            GET DIAGNOSTICS v_count = ROW_COUNT;
            v_records := v_records + v_count;
        END IF;
        v_ended := v_run.finished_at;
        v_run_id := v_run.run_id;
        v_looked := v_looked + 1;
        v_more := v_looked >= p_limit OR v_records >= p_limit OR clock_timestamp() >= v_begun + v_longest;
        EXIT WHEN v_more;
    END LOOP;

    IF v_looked > 0 THEN
        INSERT INTO idempotency_expiries (tenant_id, finished_at, run_id) VALUES (v_tenant, v_ended, v_run_id)
            ON CONFLICT (tenant_id) DO UPDATE SET finished_at = EXCLUDED.finished_at, run_id = EXCLUDED.run_id;
    END IF;
    RETURN jsonb_build_object('records', v_records, 'more', v_more);
END
$$;
