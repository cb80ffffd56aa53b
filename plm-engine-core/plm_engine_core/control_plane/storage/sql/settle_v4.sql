-- Closes one grant: the reservation becomes spend, the outcome, artifacts, ledger rows and event are written, the run may be
-- parked. `p_ledger` maps tables to rows, as plm-shared renders them; the grant is held, so nobody else writes their keys.
-- Locks in the order of admission: run, grant, budgets from narrow to wide, stream head. A standing halt does not refuse a
-- settlement: what happened is recorded.
CREATE FUNCTION engine_settle_v4(c jsonb, p_ledger json) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant   uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_run_id   uuid := (c ->> 'run_id')::uuid;
    v_id       uuid := (c ->> 'grant_id')::uuid;
    v_step     integer := (c ->> 'step_index')::integer;
    v_attempt  integer := (c ->> 'attempt')::integer;
    v_status   text := c ->> 'status';
    v_held     boolean;
    v_reserved jsonb;
    v_charged  jsonb;
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
    IF p_ledger::text <> '{}' THEN
        PERFORM engine_write_ledger_v2(v_tenant, p_ledger);
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
    IF v_reserved IS NOT NULL THEN
        v_charged := engine_charge_v4(v_tenant, v_reserved, c -> 'charges');
    ELSE
        v_charged := engine_charge_v3(v_tenant, v_id, c -> 'charges');  -- granted by version 3 or before
    END IF;
    v_seq := engine_append_event_v3(v_tenant, 'run/' || v_run_id, 'step_settled', c ->> 'actor', jsonb_strip_nulls(
        jsonb_build_object('step', v_step, 'attempt', v_attempt, 'grant_id', v_id, 'status', v_status,
            'evidence', c -> 'evidence', 'outcome_digest', c -> 'outcome_digest', 'error', c -> 'error',
            'usage', c -> 'usage', 'spent', v_charged -> 'spent', 'overrun', NULLIF(v_charged -> 'overrun', 'false'),
            'artifacts', NULLIF(c -> 'artifacts', '[]'))));
    RETURN jsonb_build_object('status', v_status, 'spent', v_charged -> 'spent', 'replayed', false);
END
$$;

-- Why a grant was not there to be closed: it was settled before, which the same outcome may hear again even after the run
-- moved on; or the caller's fencing token was replaced; or the call never began.
CREATE FUNCTION engine_settled_before_v4(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant uuid := (c ->> 'tenant_id')::uuid;
    v_run_id uuid := (c ->> 'run_id')::uuid;
    v_id     uuid := (c ->> 'grant_id')::uuid;
    v_grant  grants;
BEGIN
    SELECT * INTO v_grant FROM grants WHERE tenant_id = v_tenant AND id = v_id AND run_id = v_run_id
        AND step_index = (c ->> 'step_index')::integer AND attempt = (c ->> 'attempt')::integer FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'grant', DETAIL = v_id;
    END IF;
    IF v_grant.state = 'settled' AND v_grant.outcome_digest = c ->> 'outcome_digest' THEN
        RETURN jsonb_build_object('status', v_grant.outcome, 'replayed', true, 'spent',
            CASE WHEN v_grant.reserved IS NOT NULL THEN engine_spent_v4(v_grant.reserved, v_grant.charged)
                 ELSE engine_spent_v2(v_tenant, v_id) END);
    END IF;
    PERFORM engine_hold_run_v1(v_tenant, v_run_id, (c ->> 'fencing_token')::bigint, false);  -- says what is amiss
    IF v_grant.state = 'settled' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLC01', MESSAGE = format(
            'grant %s was already settled as %s', v_id, v_grant.outcome);
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'PLS01', MESSAGE = format(
        'grant %s was never begun, so its call cannot have ended as %s', v_id, c ->> 'status');
END
$$;
