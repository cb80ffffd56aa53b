-- Locks of resources: at most one call that is not over holds each. A row names the last call that took it, and counts only
-- while the grant of that call is live, so nothing has to be given back: settling, revoking and expiring end it by themselves.

-- How the holder of a lock stands: 'issued', 'begun' or 'unknown' hold it. 'expired' holds it no more, but may be about to
-- begin in another transaction. Null is over for good, or was never granted.
CREATE FUNCTION engine_lock_holder_v1(p_lock resource_locks) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_grant record;
BEGIN
    SELECT state, outcome, expires_at <= clock_timestamp() AS expired INTO v_grant FROM grants
        WHERE tenant_id = p_lock.tenant_id AND id = p_lock.grant_id AND run_id = p_lock.run_id
          AND step_index = p_lock.step_index AND attempt = p_lock.attempt;
    IF v_grant.state = 'issued' AND v_grant.expired THEN
        RETURN 'expired';
    ELSIF v_grant.state IN ('issued', 'begun') THEN
        RETURN v_grant.state;
    ELSIF v_grant.state = 'settled' AND v_grant.outcome = 'outcome_unknown' AND EXISTS (
            SELECT FROM run_steps WHERE tenant_id = p_lock.tenant_id AND run_id = p_lock.run_id
                AND step_index = p_lock.step_index AND attempt = p_lock.attempt AND state = 'outcome_unknown') THEN
        RETURN 'unknown';  -- nobody knows whether the call still runs
    END IF;
    RETURN NULL;
END
$$;

-- Takes the lock that a command names, for its grant, or answers how that is refused. The run is locked already. Of a row,
-- nobody changes the holder while it is locked, and what has just committed is seen by the statements after that.
CREATE FUNCTION engine_take_lock_v1(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant uuid := (c ->> 'tenant_id')::uuid;
    v_run    uuid := (c ->> 'run_id')::uuid;
    v_scope  text := c ->> 'lock';
    v_of     uuid := CASE v_scope WHEN 'run' THEN v_run WHEN 'tenant' THEN v_tenant END;
    v_hash   bytea := sha256(convert_to(c ->> 'resource', 'UTF8'));
    v_lock   resource_locks;
    v_holder text;
BEGIN
    LOOP
        INSERT INTO resource_locks (tenant_id, scope, scope_id, resource_hash, run_id, step_index, attempt, grant_id)
            VALUES (v_tenant, v_scope, v_of, v_hash, v_run, (c ->> 'step_index')::integer, (c ->> 'attempt')::integer,
                (c #>> '{grant,id}')::uuid)
            ON CONFLICT (tenant_id, scope, scope_id, resource_hash) DO NOTHING;
        IF FOUND THEN
            RETURN '{}';
        END IF;
        SELECT * INTO v_lock FROM resource_locks
            WHERE tenant_id = v_tenant AND scope = v_scope AND scope_id = v_of AND resource_hash = v_hash FOR UPDATE;
        CONTINUE WHEN NOT FOUND;  -- the sweeper removed it meanwhile
        v_holder := engine_lock_holder_v1(v_lock);
        IF v_holder = 'expired' THEN
            -- Whoever is just beginning that call looked at its end before: a changed row makes it look again.
            UPDATE grants SET state = state WHERE tenant_id = v_tenant AND id = v_lock.grant_id AND run_id = v_lock.run_id
                AND step_index = v_lock.step_index AND attempt = v_lock.attempt AND state = 'issued'
                AND expires_at <= clock_timestamp();
            CONTINUE WHEN NOT FOUND;  -- it has begun, or was settled
        ELSIF v_holder IS NOT NULL THEN
            RETURN engine_locked_v1(c, v_lock, v_holder);
        END IF;
        UPDATE resource_locks SET run_id = v_run, step_index = (c ->> 'step_index')::integer,
                attempt = (c ->> 'attempt')::integer, grant_id = (c #>> '{grant,id}')::uuid, taken_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND scope = v_scope AND scope_id = v_of AND resource_hash = v_hash;
        RETURN '{}';
    END LOOP;
END
$$;

-- How a lock refuses: it says which call holds it, and nothing else of that.
CREATE FUNCTION engine_locked_v1(c jsonb, p_lock resource_locks, p_holder text) RETURNS jsonb
LANGUAGE sql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT jsonb_build_object('outcome', 'deny', 'reason', 'resource_locked', 'rule', 'lock', 'retry_after_ms', 1000,
        'lock', jsonb_build_object('scope', p_lock.scope, 'resource', c -> 'resource', 'run_id', p_lock.run_id,
            'step', p_lock.step_index, 'held', p_holder),
        'message', format('%s is locked by step %s of run %s', left(c ->> 'resource', 200), p_lock.step_index, p_lock.run_id),
        'unblock', CASE p_holder
            WHEN 'unknown' THEN 'finding out whether that call took place, then plm-cli run reconcile ' || p_lock.run_id
            ELSE 'the end of that call' END)
$$;

-- Removes at most so many rows whose call is over for good, and waits for nobody. One that is taken anew meanwhile stays: it
-- names another grant.
CREATE FUNCTION engine_sweep_locks_v1(p_tenant uuid, p_limit integer) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant  uuid := engine_enter_v2(p_tenant);
    v_over    resource_locks;
    v_removed integer := 0;
BEGIN
    FOR v_over IN
        SELECT * FROM resource_locks AS l WHERE tenant_id = v_tenant AND engine_lock_holder_v1(l) IS NULL
        LIMIT p_limit FOR UPDATE SKIP LOCKED
    LOOP
        DELETE FROM resource_locks WHERE tenant_id = v_tenant AND scope = v_over.scope AND scope_id = v_over.scope_id
            AND resource_hash = v_over.resource_hash AND grant_id = v_over.grant_id;
        v_removed := v_removed + 1;
    END LOOP;
    RETURN v_removed;
END
$$;
