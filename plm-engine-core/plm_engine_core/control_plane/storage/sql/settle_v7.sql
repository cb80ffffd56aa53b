-- Closes one grant: the reservation becomes spend, the outcome, artifacts, ledger rows and event are written, the run may be
-- parked. `p_ledger` maps tables to rows, as plm-shared renders them; the grant is held, so nobody else writes their keys.
-- Locks in the order of admission: run, grant, budgets from narrow to wide, stream head. A standing halt does not refuse a
-- settlement: what happened is recorded. The charging of budgets stands in it, as every call of a function that pins its
-- search_path has its cost.
-- As version 6, without a bound of its own on waiting for locks: the transaction says how long.
CREATE FUNCTION engine_settle_v7(c jsonb, p_ledger jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant   uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_run_id   uuid := (c ->> 'run_id')::uuid;
    v_id       uuid := (c ->> 'grant_id')::uuid;
    v_step     integer := (c ->> 'step_index')::integer;
    v_attempt  integer := (c ->> 'attempt')::integer;
    v_status   text := c ->> 'status';
    v_held     boolean;
    v_reserved jsonb;
    v_entry    jsonb;
    v_unit     text;
    v_amount   numeric(20, 8);
    v_settled  numeric(20, 8);
    v_spent    jsonb := '{}';
    v_overrun  boolean := false;
    v_seq      bigint;
BEGIN
    SELECT fencing_token = (c ->> 'fencing_token')::bigint AND state = 'running' INTO v_held FROM run_states
        WHERE tenant_id = v_tenant AND run_id = v_run_id FOR UPDATE;
    WITH closed AS (
        UPDATE grants SET state = 'settled', settled_at = clock_timestamp(), outcome = v_status,
                outcome_digest = c ->> 'outcome_digest', charged = c -> 'charges'
            WHERE tenant_id = v_tenant AND id = v_id AND run_id = v_run_id AND step_index = v_step AND attempt = v_attempt
              AND v_held AND (state = 'begun' OR (v_status = 'not_started' AND state IN ('issued', 'revoked')))
            RETURNING reserved, settled_at)
    UPDATE run_steps SET state = v_status, output = c -> 'output', error = NULLIF(c -> 'error', 'null'),
            usage = c -> 'usage', evidence = c ->> 'evidence', finished_at = closed.settled_at
        FROM closed WHERE tenant_id = v_tenant AND run_id = v_run_id AND step_index = v_step AND attempt = v_attempt
        RETURNING closed.reserved INTO v_reserved;
    IF NOT FOUND THEN
        RETURN engine_settled_before_v4(c);
    END IF;
    IF p_ledger <> '{}' THEN
        PERFORM engine_write_ledger_v4(v_tenant, p_ledger);
    END IF;
    IF c -> 'artifacts' <> '[]' THEN
        INSERT INTO artifacts (id, tenant_id, trace_id, run_id, mime_type, size_bytes, backend, storage_uri)
            SELECT a.id, v_tenant, c ->> 'trace_id', v_run_id, a.mime_type, a.size_bytes, a.backend, a.storage_uri
            FROM jsonb_to_recordset(c -> 'artifacts')
                AS a (id uuid, mime_type text, size_bytes bigint, backend text, storage_uri text);
    END IF;
    IF v_status = 'outcome_unknown' THEN
        UPDATE run_states SET state = 'outcome_unknown', reason = 'outcome_unknown', message = c #>> '{error,message}',
                lease_owner = NULL, lease_expires_at = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND run_id = v_run_id;
    END IF;
    IF v_reserved IS NULL THEN
        -- Granted by version 3 or before: what was set aside stands in rows.
        SELECT charged -> 'spent', charged ->> 'overrun', '[]' INTO v_spent, v_overrun, v_reserved
            FROM engine_charge_v3(v_tenant, v_id, c -> 'charges') AS charged;
    END IF;
    -- A unit that `charges` leaves out is charged as reserved. What changes no amount locks nothing.
    FOR v_each IN 0 .. jsonb_array_length(v_reserved) - 1 LOOP
        v_entry := v_reserved -> v_each;
        v_unit := v_entry ->> 'unit';
        v_amount := v_entry ->> 'amount';
        v_settled := COALESCE(c #>> ARRAY['charges', v_unit], v_entry ->> 'amount');
        IF v_settled < 0 THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = format(
                '%s %s cannot be charged: an amount is never below zero', v_settled, v_unit);
        END IF;
        IF v_amount <> 0 OR v_settled <> 0 THEN
            UPDATE budgets SET reserved = reserved - v_amount, spent = spent + v_settled
                WHERE tenant_id = v_tenant AND scope_kind = v_entry ->> 'scope_kind'
                  AND scope_id = (v_entry ->> 'scope_id')::uuid AND unit = v_unit
                  AND period = COALESCE(v_entry ->> 'period', 'total')
                  AND starts_at = (v_entry ->> 'starts_at')::timestamptz;
        END IF;
        v_overrun := v_overrun OR v_settled > v_amount;
        v_spent := v_spent || jsonb_build_object(v_unit, trim_scale(v_settled)::text);
    END LOOP;
    v_seq := engine_append_event_v3(v_tenant, 'run/' || v_run_id, 'step_settled', c ->> 'actor', jsonb_strip_nulls(
        jsonb_build_object('step', v_step, 'attempt', v_attempt, 'grant_id', v_id, 'status', v_status,
            'evidence', c -> 'evidence', 'outcome_digest', c -> 'outcome_digest', 'error', c -> 'error',
            'usage', c -> 'usage', 'spent', v_spent, 'overrun', NULLIF(v_overrun, false),
            'artifacts', NULLIF(c -> 'artifacts', '[]'))));
    RETURN jsonb_build_object('status', v_status, 'spent', v_spent, 'replayed', false);
END
$$;
