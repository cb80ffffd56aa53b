-- What a settled grant cost, per unit, as texts that keep every digit. Every budget of a unit was charged alike.
CREATE FUNCTION engine_spent_v2(p_tenant uuid, p_grant uuid) RETURNS jsonb
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT COALESCE(jsonb_object_agg(unit, trim_scale(settled)::text), '{}') FROM reservations
        WHERE tenant_id = p_tenant AND grant_id = p_grant
$$;

-- Closes one grant: the reservation becomes spend, the outcome, artifacts and event are written, the run may be parked.
-- The caller has already written the ledger rows in the same transaction; a refused fencing token rolls all of it back.
-- Locks in the order of admission: run, grant, budgets from narrow to wide, stream head. A standing halt does not refuse a
-- settlement: what happened is recorded.
CREATE FUNCTION engine_settle_v2(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := (c ->> 'tenant_id')::uuid;
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_id      uuid := (c ->> 'grant_id')::uuid;
    v_status  text := c ->> 'status';
    v_grant   grants;
    v_spent   jsonb;
    v_overrun boolean;
BEGIN
    v_grant := engine_hold_grant_v1(v_tenant, v_run_id, v_id, (c ->> 'fencing_token')::bigint, c ->> 'outcome_digest');
    IF v_grant.state = 'settled' THEN
        RETURN jsonb_build_object('status', v_grant.outcome, 'spent', engine_spent_v2(v_tenant, v_id), 'replayed', true);
    END IF;
    IF v_grant.state IN ('issued', 'revoked') AND v_status <> 'not_started' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLS01', MESSAGE = format(
            'grant %s was never begun, so its call cannot have ended as %s', v_id, v_status);
    END IF;
    UPDATE grants SET state = 'settled', settled_at = clock_timestamp(), outcome = v_status,
            outcome_digest = c ->> 'outcome_digest'
        WHERE tenant_id = v_tenant AND id = v_id;
    v_overrun := engine_charge_v2(v_tenant, v_id, c -> 'charges');
    v_spent := engine_spent_v2(v_tenant, v_id);
    PERFORM engine_write_outcome_v2(c, v_grant);
    IF v_status = 'outcome_unknown' THEN
        UPDATE run_states SET state = 'outcome_unknown', reason = 'outcome_unknown', message = c #>> '{error,message}',
                lease_owner = NULL, lease_expires_at = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND run_id = v_run_id;
    END IF;
    PERFORM engine_append_event_v1(v_tenant, 'run/' || v_run_id, 'step_settled', c ->> 'actor', jsonb_strip_nulls(
        jsonb_build_object('step', v_grant.step_index, 'attempt', v_grant.attempt, 'grant_id', v_id, 'status', v_status,
            'evidence', c -> 'evidence', 'outcome_digest', c -> 'outcome_digest', 'error', c -> 'error',
            'usage', c -> 'usage', 'spent', v_spent, 'overrun', NULLIF(v_overrun, false),
            'artifacts', NULLIF(c -> 'artifacts', '[]'))));
    RETURN jsonb_build_object('status', v_status, 'spent', v_spent, 'replayed', false);
END
$$;

-- Writes what a call did into its step, and the files it left.
CREATE FUNCTION engine_write_outcome_v2(c jsonb, p_grant grants) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    UPDATE run_steps SET state = c ->> 'status', output = c -> 'output', error = NULLIF(c -> 'error', 'null'),
            usage = c -> 'usage', evidence = c ->> 'evidence', finished_at = clock_timestamp()
        WHERE tenant_id = p_grant.tenant_id AND run_id = p_grant.run_id AND step_index = p_grant.step_index
          AND attempt = p_grant.attempt;
    IF c -> 'artifacts' <> '[]' THEN
        INSERT INTO artifacts (id, tenant_id, trace_id, run_id, mime_type, size_bytes, backend, storage_uri)
            SELECT a.id, p_grant.tenant_id, c ->> 'trace_id', p_grant.run_id, a.mime_type, a.size_bytes, a.backend,
                   a.storage_uri
            FROM jsonb_to_recordset(c -> 'artifacts')
                AS a (id uuid, mime_type text, size_bytes bigint, backend text, storage_uri text);
    END IF;
END
$$;
