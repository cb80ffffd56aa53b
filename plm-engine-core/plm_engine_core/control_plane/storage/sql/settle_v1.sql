-- Locks a grant for its settlement; call it before the ledger rows are written, so that whoever may not settle is told why.
-- Settling again with the same outcome is let through even after the run moved on: it changes nothing.
CREATE FUNCTION engine_hold_grant_v1(p_tenant uuid, p_run uuid, p_grant uuid, p_fencing bigint, p_digest text)
RETURNS grants
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_grant grants;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    SELECT * INTO v_grant FROM grants WHERE tenant_id = p_tenant AND id = p_grant AND run_id = p_run;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'grant', DETAIL = p_grant;
    END IF;
    IF v_grant.state = 'settled' AND v_grant.outcome_digest = p_digest THEN
        RETURN v_grant;
    END IF;
    PERFORM engine_hold_run_v1(p_tenant, p_run, p_fencing, false);
    SELECT * INTO v_grant FROM grants WHERE tenant_id = p_tenant AND id = p_grant FOR UPDATE;
    IF v_grant.state = 'settled' AND v_grant.outcome_digest <> p_digest THEN
        RAISE EXCEPTION USING ERRCODE = 'PLC01', MESSAGE = format(
            'grant %s was already settled as %s', p_grant, v_grant.outcome);
    END IF;
    RETURN v_grant;
END
$$;

-- What a settled grant cost, per unit, as texts that keep every digit.
CREATE FUNCTION engine_spent_v1(p_tenant uuid, p_grant uuid) RETURNS jsonb
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT COALESCE(jsonb_object_agg(unit, trim_scale(settled)::text), '{}') FROM reservations
        WHERE tenant_id = p_tenant AND grant_id = p_grant AND scope_kind = 'run'
$$;

-- Closes one grant: the reservation becomes spend, the outcome, artifacts and event are written, the run may be parked.
-- The caller has already written the ledger rows in the same transaction; a refused fencing token rolls all of it back.
-- Locks in the order of admission: run, grant, budgets from narrow to wide, stream head. A standing halt does not refuse a
-- settlement: what happened is recorded.
CREATE FUNCTION engine_settle_v1(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := (c ->> 'tenant_id')::uuid;
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_id      uuid := (c ->> 'grant_id')::uuid;
    v_status  text := c ->> 'status';
    v_grant   grants;
    v_spent   jsonb;
    v_charge  record;
    v_overrun boolean := false;
BEGIN
    v_grant := engine_hold_grant_v1(v_tenant, v_run_id, v_id, (c ->> 'fencing_token')::bigint, c ->> 'outcome_digest');
    IF v_grant.state = 'settled' THEN
        RETURN jsonb_build_object('status', v_grant.outcome, 'spent', engine_spent_v1(v_tenant, v_id), 'replayed', true);
    END IF;
    IF v_grant.state = 'issued' AND v_status <> 'not_started' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLS01', MESSAGE = format(
            'grant %s was never begun, so its call cannot have ended as %s', v_id, v_status);
    END IF;
    UPDATE grants SET state = 'settled', settled_at = clock_timestamp(), outcome = v_status,
            outcome_digest = c ->> 'outcome_digest'
        WHERE tenant_id = v_tenant AND id = v_id;

    -- What is charged per unit: the measured amount, or the whole reservation where the command names none.
    FOR v_charge IN
        SELECT r.scope_kind, r.scope_id, r.unit, r.amount,
               COALESCE((c #>> ARRAY['charges', r.unit])::numeric, r.amount) AS actual
        FROM reservations AS r WHERE r.tenant_id = v_tenant AND r.grant_id = v_id
        ORDER BY CASE r.scope_kind WHEN 'run' THEN 0 ELSE 1 END, r.unit COLLATE "C"
    LOOP
        UPDATE budgets SET reserved = reserved - v_charge.amount, spent = spent + v_charge.actual
            WHERE tenant_id = v_tenant AND scope_kind = v_charge.scope_kind AND scope_id = v_charge.scope_id
              AND unit = v_charge.unit;
        v_overrun := v_overrun OR v_charge.actual > v_charge.amount;
    END LOOP;
    UPDATE reservations SET settled = COALESCE((c #>> ARRAY['charges', unit])::numeric, amount)
        WHERE tenant_id = v_tenant AND grant_id = v_id;
    v_spent := engine_spent_v1(v_tenant, v_id);

    UPDATE run_steps SET state = v_status, output = c -> 'output', error = NULLIF(c -> 'error', 'null'), usage = c -> 'usage',
            evidence = c ->> 'evidence', finished_at = clock_timestamp()
        WHERE tenant_id = v_tenant AND run_id = v_run_id AND step_index = v_grant.step_index
          AND attempt = v_grant.attempt;
    INSERT INTO artifacts (id, tenant_id, trace_id, run_id, mime_type, size_bytes, backend, storage_uri)
        SELECT a.id, v_tenant, c ->> 'trace_id', v_run_id, a.mime_type, a.size_bytes, a.backend, a.storage_uri
        FROM jsonb_to_recordset(c -> 'artifacts')
            AS a (id uuid, mime_type text, size_bytes bigint, backend text, storage_uri text);
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
